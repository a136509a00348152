"""What belongs to a learning rate: the reference's figures, and what a plan lists for real optimizers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.core.options import PlanRequest
from autobatch.core.plan import BatchPlan, make_plan
from autobatch.core.records import MemoryReading, Outcome, Probe, SearchSpace, Setting
from autobatch.core.scaling import Scaled, batch_norm_momentum, half_life_decay, scaled_eps, timescale_weight_decay

ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def plan_of(batch_size: int, request: PlanRequest, **changes: Any) -> BatchPlan:
    defaults: dict[str, Any] = {
        "device": "cpu", "device_description": "CPU", "reading": MemoryReading(capacity=100, free=100), "budget": 100, "cap": 95,
        "margin": 0.05, "has_optimizer": True, "group_lrs": (0.1,), "optimizer_name": "SGD",
    }  # fmt: skip
    return make_plan(
        setting=Setting(**{**defaults, **changes}), request=request, space=SearchSpace(), batch_size=batch_size, best=batch_size,
        probes=[Probe(batch_size=batch_size, outcome=Outcome.FIT)], wall=None, wall_kind=None, limited_by="memory", exact=True,
    )  # fmt: skip


def adamw(rule: str, batch: int = 1024, **changes: Any) -> dict[str, Scaled]:
    options = {**ADAM, "decoupled_weight_decay": 0.01}
    plan = plan_of(batch, PlanRequest(lr_rule=rule), optimizer_name="AdamW", group_lrs=(1e-3,), group_options=(options,), **changes)
    return {row.name: row for row in plan.scaling}


def test_the_references_figures() -> None:
    assert half_life_decay(0.95, 1 / 512) == pytest.approx(0.999900, abs=5e-7)
    assert half_life_decay(0.999, 8) == pytest.approx(0.992028, abs=5e-7)
    assert half_life_decay(0.9999, 8) == pytest.approx(0.9992, abs=5e-7)
    assert [timescale_weight_decay(0.01, 4, scale) for scale in (2, 1, 4)] == pytest.approx([0.02, 0.04, 0.01])  # sqrt, none, linear
    assert [batch_norm_momentum(0.1, 32 * k, 32) for k in (1, 2, 8)] == pytest.approx([0.1, 0.19, 0.57], abs=5e-3)
    assert scaled_eps(1e-8, 4) == 5e-9


@given(st.floats(0.5, 0.99999), st.floats(1 / 4096, 4096))
def test_the_half_life_in_samples_is_kept_and_agrees_with_the_sde_rule_to_first_order(beta: float, growth: float) -> None:
    scaled = half_life_decay(beta, growth)
    assert 0 <= scaled < 1
    assert half_life_decay(scaled, 1 / growth) == pytest.approx(beta) or scaled < 1e-9
    step = growth * (1 - beta)
    assert abs(scaled - (1 - step)) <= step**2 / 2 + growth * (1 - beta) ** 2 + 1e-12


def test_the_square_root_rule_scales_all_of_adam() -> None:
    rows = adamw("sqrt")
    assert {name: row.after for name, row in rows.items() if row.written != "nothing"} == pytest.approx(
        {"learning rate": 2e-3, "beta1": 0.9**4, "beta2": 0.999**4, "eps": 5e-9, "weight decay": 0.02}
    )
    assert {name for name, row in rows.items() if row.written == "apply"} == {"learning rate"}
    assert rows["beta2"].formula == "0.999^4"
    assert "2507.07101" in rows["beta2"].source
    assert "2205.10287" in rows["beta2"].source
    assert (rows["beta1"].caveat, rows["beta2"].caveat) == ("", "")
    assert adamw("sqrt", 4096)["beta1"].caveat == "growth × (1 − beta1) = 1.6 is not small, as the SDE rule takes it to be"


@pytest.mark.parametrize(("rule", "decay"), [("linear", 0.01), ("none", 0.04)])
def test_other_rules_leave_beta1_and_eps(rule: str, decay: float) -> None:
    rows = adamw(rule)
    assert "beta1" not in rows
    assert "eps" not in rows
    assert rows["beta2"].after == pytest.approx(0.999**4)
    assert rows["weight decay"].after == pytest.approx(decay)


def test_sgds_weight_decay_stays_and_its_momentum_is_not_a_beta() -> None:
    plan = plan_of(1024, PlanRequest(), group_options=({"weight_decay": 1e-4},))
    rows = {row.name: row for row in plan.scaling}
    assert set(rows) == {"learning rate", "weight decay", "warm-up steps", "EMA decay"}
    assert (rows["weight decay"].before, rows["weight decay"].after, rows["weight decay"].written) == (1e-4, 1e-4, "nothing")
    assert "1706.02677" in rows["weight decay"].source


def test_rmsprops_average_is_scaled_and_said_to_be_shown_for_adam_only() -> None:
    plan = plan_of(512, PlanRequest(lr_rule="auto"), optimizer_name="RMSprop", group_options=({"alpha": 0.99, "eps": 1e-8},))
    rows = {row.name: row for row in plan.scaling}
    assert rows["alpha"].after == pytest.approx(0.99**2)
    assert rows["alpha"].caveat == "shown for Adam, not for RMSprop"


def test_a_batch_norms_momentum_is_advised_only_where_the_base_micro_batch_is_known() -> None:
    found = {"has_batch_norm": True, "batch_norm_momentum": 0.1}
    named = plan_of(64, PlanRequest(base_batch_size=32), **found)
    assert named.scaling[-1].after == pytest.approx(0.19)
    assert named.scaling[-1].written == "nothing"
    for request in (PlanRequest(), PlanRequest(base_batch_size=32, world_size=2), PlanRequest(base_batch_size=64)):
        assert "BatchNorm momentum" not in [row.name for row in plan_of(64, request, **found).scaling]


def test_the_warm_up_is_as_many_samples_at_any_batch() -> None:
    plan = plan_of(512, PlanRequest(base_lr=0.1, base_batch_size=32, dataset_size=1437, epochs=20))
    row = next(row for row in plan.scaling if row.name == "warm-up steps")
    assert (row.before, row.after) == (225, 15)
    assert [row.name for row in plan_of(16, PlanRequest(base_batch_size=32)).scaling] == ["learning rate", "EMA decay"]


def test_every_group_has_its_own_rows() -> None:
    plan = plan_of(1024, PlanRequest(base_lr=0.2), group_lrs=(0.1, 0.01), group_options=({"weight_decay": 0.1}, {}))
    assert [(row.group, row.before, row.after, row.formula) for row in plan.scaling[:2]] == [
        (0, 0.2, 0.8, "0.2 × 1024 / 256"),
        (1, pytest.approx(0.02), pytest.approx(0.08), "0.02 × 4"),
    ]
    assert (plan.optimizer_lrs, plan.optimizer_name) == ((0.1, 0.01), "SGD")


def test_at_the_base_batch_nothing_but_the_rate_is_listed_and_without_a_rate_nothing() -> None:
    assert [(row.before, row.after) for row in plan_of(256, PlanRequest(), group_options=(ADAM,)).scaling] == [(0.1, 0.1)]
    assert plan_of(256, PlanRequest(), group_lrs=()).scaling == ()


@pytest.mark.parametrize("rule", ["linear", "sqrt", "none", "auto", "noise", "sqrt-saturating", "surge"])
def test_a_plan_with_everything_scaled_survives_json(rule: str) -> None:
    request = PlanRequest(lr_rule=rule, noise_scale=4000.0, base_batch_size=8, dataset_size=100, drop_last=True)
    options = ({**ADAM, "decoupled_weight_decay": 0.01},)
    plan = plan_of(64, request, optimizer_name="AdamW", group_options=options, batch_norm_momentum=0.1)
    assert BatchPlan.from_json(plan.to_json()) == plan
    assert all(row.formula and row.source for row in plan.scaling)
