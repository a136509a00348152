"""The scaling rules against the published figures."""

from __future__ import annotations

import math
from typing import Any

import pytest

from autobatch.core.errors import InvalidRequest
from autobatch.core.learning_rate import RULES, check_rule, optimizer_family, scale
from autobatch.core.options import PlanRequest
from autobatch.core.records import MemoryReading, Setting
from autobatch.core.scaling import group_rates

UNKNOWN = 'the optimizer {}is not known: lr_rule "auto" took the more careful square root rule; name one with lr_rule='


def setting(*group_lrs: float, name: str = "SGD", mode: str = "train") -> Setting:
    reading = MemoryReading(capacity=100, free=100)
    return Setting(
        device="cpu", device_description="CPU", reading=reading, budget=100, cap=95, margin=0.05, group_lrs=group_lrs,
        has_optimizer=bool(group_lrs), optimizer_name=name if group_lrs else "", mode=mode,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "lr"),
    [(256, 0.1), (512, 0.2), (1024, 0.4), (2048, 0.8), (4096, 1.6), (8192, 3.2), (16384, 6.4), (32768, 12.8), (65536, 25.6)],
)
def test_linear_gives_the_published_table(batch: int, lr: float) -> None:
    rate = scale("linear", 0.1, batch, 256, "SGD")
    assert rate.lr == pytest.approx(lr, rel=1e-12)
    assert rate.scale == batch / 256
    assert rate.formula == f"0.1 × {batch} / 256"
    assert "1706.02677" in rate.evidence


@pytest.mark.parametrize(("batch", "lr"), [(512, 4e-4), (1024, 5.657e-4), (4096, 1.1314e-3)])
def test_sqrt_gives_the_published_figures(batch: int, lr: float) -> None:
    rate = scale("sqrt", 4e-4, batch, 512, "AdamW")
    assert rate.lr == pytest.approx(lr, rel=1e-4)
    assert rate.formula == f"0.0004 × √({batch} / 512)"
    assert rate.caveats == ()
    assert "1404.5997" in rate.evidence
    assert "2205.10287" in rate.evidence


def test_none_leaves_the_learning_rate() -> None:
    rate = scale("none", 0.1, 4096, 256, "SGD")
    assert (rate.lr, rate.scale, rate.formula, rate.caveats) == (0.1, 1.0, "0.1", ())


def test_a_smaller_batch_scales_down_without_a_caveat() -> None:
    assert (scale("linear", 0.1, 64, 256, "SGD").lr, scale("linear", 0.1, 64, 256, "SGD").caveats) == (0.025, ())
    assert scale("sqrt", 0.1, 64, 256, "AdamW").lr == 0.05


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("SGD", "linear"), ("ASGD", "linear"), ("FusedSGD", "linear"), ("LARS", "linear"),
        ("Adam", "sqrt"), ("AdamW", "sqrt"), ("PagedAdamW8bit", "sqrt"), ("SparseAdam", "sqrt"), ("RMSprop", "sqrt"),
        ("Adagrad", "sqrt"), ("Adafactor", "sqrt"), ("FusedLAMB", "sqrt"), ("Lion", "sqrt"), ("Muon", "sqrt"),
    ],
)  # fmt: skip
def test_auto_goes_by_the_optimizers_family(name: str, rule: Any) -> None:
    rate = scale("auto", 0.1, 512, 256, name)
    assert (rate.rule, rate.caveats) == (rule, ())
    assert optimizer_family(name) == {"linear": "sgd", "sqrt": "adaptive"}[rule]


@pytest.mark.parametrize(("name", "said"), [("LBFGS", "LBFGS "), ("", "")])
def test_auto_takes_sqrt_for_an_optimizer_it_does_not_know_and_says_so(name: str, said: str) -> None:
    rate = scale("auto", 0.1, 1024, 256, name)
    assert (rate.rule, rate.lr) == ("sqrt", 0.2)
    assert rate.caveats == (UNKNOWN.format(said),)


def test_linear_beyond_32_times_shows_the_published_errors() -> None:
    assert scale("linear", 0.1, 8192, 256, "SGD").caveats == ()
    assert scale("linear", 0.1, 8448, 256, "SGD").caveats == (
        "the batch grows 33× over base_batch_size 256; the linear rule is shown to hold up to 32× with warm-up "
        "(ResNet-50 on ImageNet, base batch 256): top-1 error 23.60 % at 256, 23.74 % at 8,192 (32×), but 24.79 % at 16,384 "
        "(64×), 27.55 % at 32,768 (128×) and 33.96 % at 65,536 (256×)",
    )


@pytest.mark.parametrize("rule", ["sqrt", "none"])
def test_every_rule_has_a_caveat_far_from_the_base_batch(rule: Any) -> None:
    caveats = scale(rule, 0.1, 1024, 1, "AdamW").caveats
    assert caveats == (f"the batch grows 1024× over base_batch_size 1; {RULES[rule].caveat}",)


def test_linear_with_an_adaptive_optimizer_shows_the_square_root_beside_it() -> None:
    assert scale("linear", 0.001, 1024, 256, "AdamW").caveats == (
        "AdamW is adaptive, and the evidence for the linear rule is from SGD; the square root rule (arXiv 2205.10287) gives "
        '0.002, not 0.004: lr_rule="sqrt"',
    )
    assert scale("linear", 0.001, 256, 256, "AdamW").caveats == ()


def test_a_callable_is_asked_and_named() -> None:
    def cubic(base_lr: float, global_batch: int, base_batch: int) -> float:
        return base_lr * (global_batch / base_batch) ** (1 / 3)

    rate = scale(cubic, 0.1, 2048, 256, "AdamW")
    assert rate.lr == pytest.approx(0.2)
    assert rate.scale == pytest.approx(2)
    assert (rate.rule, rate.formula, rate.caveats) == ("cubic", "cubic(0.1, 2048, 256)", ())


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, None, "0.1", True, 10**400])
def test_a_callable_that_gives_no_learning_rate_is_refused_by_name_and_value(value: object) -> None:
    def broken(base_lr: float, global_batch: int, base_batch: int) -> Any:
        return value

    with pytest.raises(InvalidRequest) as caught:
        scale(broken, 0.1, 512, 256)
    assert str(caught.value) == (
        f"lr_rule broken gave the learning rate {value!r}; a finite number above zero is wanted. "
        "Check the rule, base_lr and base_batch_size."
    )


def test_a_learning_rate_that_overflows_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="lr_rule linear gave the learning rate inf"):
        scale("linear", 1e308, 2560, 256)


@pytest.mark.parametrize("rule", ["liner", None, 2])
def test_an_unknown_rule_is_told_with_those_known(rule: Any) -> None:
    for refuse in (lambda: check_rule(rule), lambda: scale(rule, 0.1, 512, 256)):
        with pytest.raises(InvalidRequest) as caught:
            refuse()
        assert str(caught.value) == (
            f"lr_rule is {rule!r}; known: linear, sqrt, none, noise, sqrt-saturating, surge, auto, or a callable "
            "rule(base_lr, global_batch, base_batch) -> learning rate."
        )


def test_the_optimizers_own_rates_are_scaled_group_by_group() -> None:
    rates = group_rates(setting(0.1, 0.01), PlanRequest(), 512)
    assert (rates.base_lr, rates.lrs) == (0.1, pytest.approx((0.2, 0.02)))
    assert rates.notes == (
        "the optimizer's learning rate 0.1 is taken to suit a global batch of 256 rows; if it was tuned at another, pass base_batch_size=",
    )
    assert group_rates(setting(0.1, 0.01), PlanRequest(), 256).notes == ()


def test_base_lr_replaces_the_first_group_and_the_others_keep_their_ratio() -> None:
    rates = group_rates(setting(0.1, 0.01, 0.0), PlanRequest(base_lr=1), 512)
    assert (rates.base_lr, rates.lrs) == (1.0, pytest.approx((2, 0.2, 0)))
    assert rates.notes == ("base_lr 1 replaces the optimizer's 0.1; its other parameter groups keep their ratio to that",)
    assert group_rates(setting(0.1), PlanRequest(base_lr=1), 512).notes == ()


def test_a_frozen_first_group_is_not_the_base() -> None:
    rates = group_rates(setting(0.0, 0.1), PlanRequest(), 512)
    assert (rates.base_lr, rates.lrs) == (0.1, pytest.approx((0, 0.2)))


def test_base_lr_alone_is_enough() -> None:
    rates = group_rates(setting(), PlanRequest(base_lr=0.1), 512)
    assert rates.scaled is not None
    assert (rates.scaled.lr, rates.lrs, rates.notes) == (0.2, (), ())


@pytest.mark.parametrize(
    ("groups", "mode", "notes"),
    [
        ((), "train", ("no learning rate: pass base_lr= and base_batch_size=, the global batch size it was tuned at",)),
        ((0.0, 0.0), "train", ("no learning rate: the optimizer's own is 0, 0 (a schedule may have set it); pass base_lr=",)),
        ((math.nan,), "train", ("no learning rate: the optimizer's own is nan (a schedule may have set it); pass base_lr=",)),
        ((), "eval", ()),
    ],
)
def test_without_a_usable_rate_there_is_none_and_the_remedy_is_told(groups: tuple[float, ...], mode: str, notes: tuple[str, ...]) -> None:
    rates = group_rates(setting(*groups, mode=mode), PlanRequest(), 512)
    assert (rates.base_lr, rates.scaled, rates.lrs, rates.notes) == (None, None, (), notes)


def test_a_misspelt_rule_is_refused_before_anything_runs() -> None:
    with pytest.raises(InvalidRequest, match="lr_rule is 'liner'"):
        PlanRequest(lr_rule="liner")


# McCandlish et al. 2018 give 15,000 rows as ImageNet's critical batch; linear would give 3.2, 6.4 and 25.6.
@pytest.mark.parametrize(("batch", "lr"), [(256, 0.1), (8192, 2.105), (16384, 3.111), (65536, 4.849)])
def test_the_noise_rule_saturates(batch: int, lr: float) -> None:
    rate = scale("noise", 0.1, batch, 256, "SGD", noise_scale=15000)
    assert rate.lr == pytest.approx(lr, rel=5e-4)
    assert rate.formula == f"0.1 × (1 + 15000 / 256) / (1 + 15000 / {batch})"
    assert "1812.06162" in rate.evidence


def test_the_noise_rule_is_adascales_gain_and_tends_to_linear_and_to_a_limit() -> None:
    gain = (15000 / 256 + 1) / (15000 / 256 / 32 + 1)
    assert scale("noise", 1.0, 32 * 256, 256, noise_scale=15000).lr == pytest.approx(gain, rel=1e-12)
    assert gain == pytest.approx(21.050, abs=5e-4)
    assert scale("noise", 1.0, 512, 256, noise_scale=1e12).lr == pytest.approx(2)
    assert scale("noise", 1.0, 2**40, 256, noise_scale=15000).lr == pytest.approx(1 + 15000 / 256, rel=1e-6)


@pytest.mark.parametrize(("batch", "factor"), [(512, 1.3356), (1024, 1.7), (4096, 2.125), (16384, 1.7), (65536, 1.0)])
def test_the_surge_rule_peaks_at_the_noise_scale(batch: int, factor: float) -> None:
    assert scale("surge", 1.0, batch, 256, "Adam", noise_scale=4096).lr == pytest.approx(factor, abs=5e-5)


def test_the_saturating_square_root_is_the_root_of_the_noise_rule() -> None:
    noise, root = (scale(rule, 1.0, 8192, 256, noise_scale=15000).lr for rule in ("noise", "sqrt-saturating"))
    assert root == pytest.approx(noise**0.5)


@pytest.mark.parametrize("rule", ["noise", "sqrt-saturating", "surge"])
def test_a_rule_without_its_noise_scale_is_refused_with_the_way_to_one(rule: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        PlanRequest(lr_rule=rule)
    assert str(caught.value) == (
        f'lr_rule "{rule}" needs the gradient noise scale in rows, and none was given. autobatch.noise_scale(model, loader, loss_fn) '
        "measures it; pass noise_scale= (--noise-scale), or take a rule that needs none: linear, sqrt."
    )


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "2000", True])
def test_a_noise_scale_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="noise_scale is"):
        PlanRequest(noise_scale=value)


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, "0.1", True])
def test_a_base_learning_rate_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="base_lr is .*; a learning rate above zero is wanted"):
        PlanRequest(base_lr=value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_batch_size": 0}, "base_batch_size is 0; a whole number of 1 or more"),
        ({"global_batch_size": 3, "world_size": 4}, "global_batch_size 3 is below the 4 devices: some would have no row"),
        ({"dataset_size": 3, "world_size": 4, "drop_last": True}, "a data set of 3 rows gives 4 devices no row each"),
    ],
)
def test_sizes_that_leave_a_device_without_a_row_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        PlanRequest(**options)


# timm's train.py takes the square root where the name contains "ada" or "lamb" and linear elsewhere.
@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "radam", "adafactor", "adagrad", "adadelta", "adabelief", "adan", "lamb"])
def test_auto_agrees_with_timm(name: str) -> None:
    assert scale("auto", 0.1, 512, 256, name).rule == "sqrt"


@pytest.mark.parametrize("name", ["rmsprop", "lion", "muon", "SignSGD"])
def test_auto_takes_the_square_root_for_every_adaptive_family(name: str) -> None:
    assert scale("auto", 0.1, 512, 256, name).rule == "sqrt"


def test_eight_devices_at_the_rate_of_one() -> None:
    assert scale("linear", 1e-3, 8, 1).lr == pytest.approx(8e-3)
    assert scale("sqrt", 1e-3, 8, 1).lr == pytest.approx(2.828e-3, rel=1e-3)
