"""A plan in real optimizers and under real schedules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, RMSprop, SparseAdam
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR, StepLR

from autobatch.core.errors import InvalidRequest
from autobatch.core.options import PlanRequest
from autobatch.core.plan import BatchPlan, make_plan
from autobatch.core.records import MemoryReading, Outcome, Probe, SearchSpace, Setting
from autobatch.workload.workload import build_workload

MODEL = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def plan_for(optimizer: Optimizer | None, batch_size: int = 1024, **request: Any) -> BatchPlan:
    work = build_workload(MODEL, torch.zeros(1, 4), optimizer=optimizer)
    setting = Setting(
        device="cpu", device_description="CPU", reading=MemoryReading(capacity=100, free=100), budget=100, cap=95, margin=0.05,
        has_optimizer=optimizer is not None, group_lrs=work.group_lrs, group_options=work.group_options,
        optimizer_name=type(optimizer).__name__ if optimizer else "",
    )  # fmt: skip
    return make_plan(
        setting=setting, request=PlanRequest(**request), space=SearchSpace(), batch_size=batch_size, best=batch_size, wall=None,
        wall_kind=None, probes=[Probe(batch_size=batch_size, outcome=Outcome.FIT)], limited_by="memory", exact=True,
    )  # fmt: skip


def sgd(lr: Any = 0.1, second: float = 0.01) -> SGD:
    return SGD([{"params": MODEL[0].parameters()}, {"params": MODEL[1].parameters(), "lr": second}], lr=lr, weight_decay=1e-4)


def lrs(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def test_every_groups_learning_rate_is_written_and_nothing_else() -> None:
    optimizer = sgd()
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    written = plan_for(sgd()).apply(optimizer)
    assert lrs(optimizer) == pytest.approx([0.4, 0.04])
    assert [(row.name, row.group, row.after) for row in written] == [
        ("learning rate", 0, pytest.approx(0.4)),
        ("learning rate", 1, pytest.approx(0.04)),
    ]
    for old, new in zip(before, optimizer.state_dict()["param_groups"], strict=True):
        assert {key: value for key, value in new.items() if key not in ("lr", "autobatch_lr_scale")} == {
            key: value for key, value in old.items() if key != "lr"
        }


def test_everything_else_is_written_when_asked_for() -> None:
    optimizer = AdamW(MODEL.parameters(), lr=1e-3)
    plan = plan_for(optimizer, lr_rule="sqrt")
    plan.apply(optimizer, everything=True)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["eps"], group["weight_decay"]) == pytest.approx((2e-3, 5e-9, 0.02))
    assert group["betas"] == pytest.approx((0.9**4, 0.999**4))
    rms = RMSprop(MODEL.parameters(), lr=1e-3)
    plan_for(rms, lr_rule="sqrt").apply(rms, everything=True)
    assert rms.param_groups[0]["alpha"] == pytest.approx(0.99**4)


def test_by_default_betas_eps_and_weight_decay_stay() -> None:
    optimizer = AdamW(MODEL.parameters(), lr=1e-3)
    plan_for(optimizer, lr_rule="sqrt").apply(optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["eps"], group["weight_decay"], group["betas"]) == (2e-3, 1e-8, 0.01, (0.9, 0.999))


def test_a_plan_from_a_file_does_the_same() -> None:
    optimizer = AdamW(MODEL.parameters(), lr=1e-3)
    BatchPlan.from_json(plan_for(optimizer, lr_rule="sqrt").to_json()).apply(optimizer, everything=True)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["eps"]) == pytest.approx((2e-3, 5e-9))


def test_an_l2_penalty_stays_even_then() -> None:
    optimizer = Adam(MODEL.parameters(), lr=1e-3, weight_decay=0.1)
    plan_for(optimizer, lr_rule="sqrt").apply(optimizer, everything=True)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_a_learning_rate_in_a_tensor_stays_that_tensor() -> None:
    rate = torch.tensor(1e-3)
    optimizer = Adam(MODEL.parameters(), lr=rate, capturable=False, foreach=False)
    plan_for(Adam(MODEL.parameters(), lr=1e-3), lr_rule="sqrt").apply(optimizer)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(2e-3)


def test_twice_is_refused_also_after_the_state_went_through_a_file() -> None:
    optimizer, resumed = sgd(), sgd()
    plan = plan_for(sgd())
    plan.apply(optimizer)
    resumed.load_state_dict(optimizer.state_dict())
    for scaled in (optimizer, resumed):
        with pytest.raises(InvalidRequest) as caught:
            plan.apply(scaled)
        assert str(caught.value) == (
            "The optimizer's learning rate is scaled already (× 4; it is 0.4, 0.04 now), by plan.apply or in a state dict that was "
            "loaded. Leave this call out."
        )
        assert lrs(scaled) == pytest.approx([0.4, 0.04])
    # A state from before the plan takes scaling and mark back together.
    optimizer.load_state_dict(sgd().state_dict())
    plan.apply(optimizer)
    assert lrs(optimizer) == pytest.approx([0.4, 0.04])


def test_a_mark_is_plain_data() -> None:
    optimizer = sgd()
    plan_for(sgd()).apply(optimizer)
    assert [group["autobatch_lr_scale"] for group in optimizer.state_dict()["param_groups"]] == [4.0, 4.0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: sgd(0.2), r"learning rate is 0\.2, 0\.01; the plan scales from 0\.1, 0\.01"),
        (lambda: sgd(0.4, 0.04), r"learning rate is 0\.4, 0\.04 already, what the plan asks for"),
        (lambda: SGD(MODEL.parameters(), lr=0.1), "has 1 parameter groups; the plan was made for one with 2"),
        (lambda: AdamW(MODEL.parameters(), lr=0.1), "The plan was made for SGD; this is AdamW"),
        (lambda: [sgd(), sgd()], "2 optimizers were given; a plan is for one"),
        (lambda: MODEL, "optimizer is a Sequential; a torch.optim.Optimizer is wanted"),
    ],
)
def test_an_optimizer_that_the_plan_was_not_made_for_is_refused_unchanged(other: Any, message: str) -> None:
    optimizer = other()
    before = lrs(optimizer) if isinstance(optimizer, Optimizer) else None
    with pytest.raises(InvalidRequest, match=message):
        plan_for(sgd()).apply(optimizer)
    if before is not None:
        assert lrs(optimizer) == before


def test_an_option_that_differs_is_refused_before_anything_is_written() -> None:
    optimizer = AdamW(MODEL.parameters(), lr=1e-3, betas=(0.9, 0.95))
    with pytest.raises(InvalidRequest, match=r"beta2 is 0\.95 in parameter group 0; the plan scales it from 0\.999"):
        plan_for(AdamW(MODEL.parameters(), lr=1e-3), lr_rule="sqrt").apply(optimizer, everything=True)
    assert lrs(optimizer) == [1e-3]


def test_base_lr_replaces_the_optimizers_own() -> None:
    plan = plan_for(sgd(), base_lr=0.2)
    own, at_base = sgd(), sgd(0.2, 0.02)
    for optimizer in (own, at_base):
        plan.apply(optimizer)
        assert lrs(optimizer) == pytest.approx([0.8, 0.08])


def test_a_plan_without_an_optimizer_scales_one_that_has_its_base_rate() -> None:
    plan = plan_for(None, base_lr=0.1)
    optimizer = sgd()
    plan.apply(optimizer)
    assert lrs(optimizer) == pytest.approx([0.4, 0.04])
    with pytest.raises(InvalidRequest, match="The plan has no learning rate to write"):
        plan_for(None).apply(sgd())


def test_a_schedule_that_was_built_before_is_refused() -> None:
    optimizer = sgd()
    StepLR(optimizer, 1)
    with pytest.raises(InvalidRequest, match="Call plan.apply\\(optimizer\\) before schedules are built"):
        plan_for(sgd()).apply(optimizer)


def test_what_an_earlier_schedule_left_is_scaled_too() -> None:
    earlier, optimizer = sgd(), sgd()
    StepLR(earlier, 1)
    optimizer.load_state_dict(earlier.state_dict())
    plan_for(sgd()).apply(optimizer)
    assert [group["initial_lr"] for group in optimizer.param_groups] == pytest.approx([0.4, 0.04])
    CosineAnnealingLR(optimizer, 10)
    assert lrs(optimizer) == pytest.approx([0.4, 0.04])


def test_lbfgs_is_refused_with_the_reason_and_stays_at_its_own_rate() -> None:
    optimizer = LBFGS(MODEL.parameters(), lr=0.5)
    with pytest.raises(InvalidRequest, match="LBFGS finds the length of its steps from the curvature"):
        plan_for(None, base_lr=0.5).apply(optimizer)
    plan_for(None, base_lr=0.5, lr_rule="none").apply(optimizer)
    assert lrs(optimizer) == [0.5]


def test_sparse_adam_is_scaled_as_adam_is() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = SparseAdam(table.parameters(), lr=1e-3)
    plan = plan_for(SparseAdam(MODEL.parameters(), lr=1e-3), lr_rule="auto")
    plan.apply(optimizer, everything=True)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["eps"]) == pytest.approx((2e-3, 5e-9))
    assert group["betas"] == pytest.approx((0.9**4, 0.999**4))
    table(torch.tensor([1, 2])).sum().backward()
    optimizer.step()


def rates_over(optimizer: Optimizer, schedule: Any, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(lrs(optimizer)[0])
        optimizer.step()
        schedule.step()
    return seen


def test_the_warm_up_is_goyals_ramp() -> None:
    optimizer = sgd()
    plan = plan_for(sgd())
    plan.apply(optimizer)
    warmup = plan.warmup(optimizer, samples=5 * 1024)
    assert isinstance(warmup, LinearLR)
    assert rates_over(optimizer, warmup, 8) == pytest.approx([0.1 + (0.4 - 0.1) * t / 5 for t in range(5)] + [0.4] * 3)
    assert lrs(optimizer) == pytest.approx([0.4, 0.04])


def test_its_length_in_epochs_samples_and_by_default() -> None:
    def length(**how: int) -> int:
        optimizer = sgd()
        plan = plan_for(sgd(), dataset_size=3000, epochs=3)
        plan.apply(optimizer)
        return plan.warmup(optimizer, **how).total_iters  # type: ignore[attr-defined, no-any-return]

    assert (length(), length(epochs=2), length(samples=1025)) == (9, 6, 2)
    optimizer = sgd()
    plan = plan_for(sgd())
    plan.apply(optimizer)
    with pytest.raises(InvalidRequest, match="does not know how long an epoch is. Give samples="):
        plan.warmup(optimizer)
    with pytest.raises(InvalidRequest, match="as 9 samples and as 1 epochs"):
        plan.warmup(optimizer, samples=9, epochs=1)


@pytest.mark.parametrize("batch_size", [128, 256])
def test_a_rate_that_did_not_grow_has_no_warm_up(batch_size: int) -> None:
    optimizer = sgd()
    plan = plan_for(sgd(), batch_size)
    plan.apply(optimizer) if plan.lr_scale != 1 else None
    warmup = plan.warmup(optimizer)
    assert isinstance(warmup, ConstantLR)
    assert rates_over(optimizer, warmup, 4) == pytest.approx([0.1 * batch_size / 256] * 4)


def test_a_warm_up_before_apply_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"learning rate is 0\.1, 0\.01, not the plan's 0\.4, 0\.04 .* Call plan\.apply"):
        plan_for(sgd()).warmup(sgd(), samples=10)
    built_with_it = sgd(0.4, 0.04)
    plan_for(sgd()).warmup(built_with_it, samples=10_240)
    assert lrs(built_with_it) == pytest.approx([0.1, 0.01])


def test_it_goes_before_a_schedule_of_the_users_in_sequence() -> None:
    optimizer = sgd()
    plan = plan_for(sgd())
    plan.apply(optimizer)
    warmup = plan.warmup(optimizer, samples=4 * 1024)
    schedule = SequentialLR(optimizer, [warmup, CosineAnnealingLR(optimizer, 10)], milestones=[4])
    seen = rates_over(optimizer, schedule, 15)
    assert seen[:5] == pytest.approx([0.1, 0.175, 0.25, 0.325, 0.4])
    assert seen[9] == pytest.approx(0.2)
    assert seen[14] == pytest.approx(0.0, abs=1e-12)


def test_it_goes_beside_a_schedule_of_the_users_in_a_chain() -> None:
    optimizer = sgd()
    plan = plan_for(sgd())
    plan.apply(optimizer)
    schedule = ChainedScheduler([plan.warmup(optimizer, samples=4 * 1024), StepLR(optimizer, 6, gamma=0.1)], optimizer)
    assert rates_over(optimizer, schedule, 8) == pytest.approx([0.1, 0.175, 0.25, 0.325, 0.4, 0.4, 0.04, 0.04])


def test_a_run_resumed_in_its_warm_up_goes_on_as_if_it_had_not_stopped() -> None:
    def build() -> tuple[Optimizer, Any]:
        optimizer = sgd()
        plan = plan_for(sgd())
        plan.apply(optimizer)
        return optimizer, plan.warmup(optimizer, samples=6 * 1024)

    optimizer, warmup = build()
    whole = rates_over(optimizer, warmup, 8)
    optimizer, warmup = build()
    rates_over(optimizer, warmup, 3)
    again, resumed = build()
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(warmup.state_dict())
    assert rates_over(again, resumed, 5) == pytest.approx(whole[3:])


def test_a_search_that_is_given_a_scaled_optimizer_says_what_it_takes_its_rate_for() -> None:
    optimizer = sgd()
    plan_for(optimizer).apply(optimizer)
    (note,) = build_workload(MODEL, torch.zeros(1, 4), optimizer=optimizer).notes
    assert note.startswith("the optimizer's learning rate was scaled by plan.apply already (× 4) and was taken for the one tuned at ")
    assert build_workload(MODEL, torch.zeros(1, 4), optimizer=sgd()).notes == ()
