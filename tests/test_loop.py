"""The loop from the first probe to the plan, on memory that is a formula."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from autobatch import BatchPlan, DeviceUnavailable, InvalidRequest, NoBatchSizeFits, Probe, Setting, Trying
from autobatch.core.options import PlanRequest, SearchOptions
from autobatch.core.units import GIB, MIB
from autobatch.loop import Run
from autobatch.simulate.synthetic import SyntheticProber, SyntheticWorkload

CARD = {"capacity": 24 * GIB, "fixed": 2 * GIB, "per_sample": 50 * MIB}


def plan_of(card: dict[str, Any] | None = None, *, readable: bool = True, progress: Any = None, **options: Any) -> BatchPlan:
    search = {name: options.pop(name) for name in list(options) if name in SearchOptions.__dataclass_fields__}
    prober = SyntheticProber(SyntheticWorkload(**{**CARD, **(card or {})}), readable=readable)
    return Run(prober, PlanRequest(**options), SearchOptions(**search), progress).plan()


def sizes(plan: BatchPlan) -> list[str]:
    return [f"{p.batch_size}{'' if p.outcome.fits else '!'}{' confirmed' if p.confirmation else ''}" for p in plan.probes]


def test_with_readings_the_wall_is_predicted_and_nothing_fails() -> None:
    plan = plan_of()
    largest = SyntheticWorkload(**CARD).largest_fit()
    assert all(probe.outcome.fits for probe in plan.probes)
    assert 0.99 * largest <= plan.batch_size <= largest
    assert (plan.limited_by, plan.wall_kind, plan.exact) == ("memory", "predicted", False)
    assert plan.notes[0].startswith(f"not exact: next untested size is {plan.batch_size + 1}; from {plan.wall} on, the memory")


def test_exactness_is_proven_by_a_probe_that_failed() -> None:
    plan = plan_of(tolerance=0)
    assert plan.batch_size == SyntheticWorkload(**CARD).largest_fit() == 450
    assert sizes(plan)[-1] == "450 confirmed"
    assert "451!" in sizes(plan)
    assert (plan.exact, plan.wall, plan.wall_kind) == (True, 451, "probed")


def test_without_readings_it_doubles_and_bisects() -> None:
    plan = plan_of({"per_sample": 2 * GIB}, readable=False, tolerance=0)
    assert sizes(plan) == ["1", "2", "4", "8", "16!", "12!", "10", "11", "11 confirmed"]


def test_a_confirmation_that_does_not_fit_sends_the_search_below() -> None:
    plan = plan_of({"confirmation": 1.1}, tolerance=0)
    tried = [p for p in plan.probes if p.confirmation]
    assert [p.outcome.fits for p in tried] == [False] * (len(tried) - 1) + [True]
    assert tried[0].batch_size == 450
    assert plan.batch_size == tried[-1].batch_size == plan.best
    assert plan.wall == plan.batch_size + 1
    assert plan.batch_size in [p.batch_size for p in plan.probes if not p.confirmation and p.outcome.fits]


def test_a_size_that_fails_its_confirmation_is_named_in_the_plan() -> None:
    plan = plan_of({"confirmation": 1.1}, tolerance=0)
    failed = [p.batch_size for p in plan.probes if p.confirmation and not p.outcome.fits]
    told = [note for note in plan.notes if "failed the longer trial" in note]
    assert told == [
        f"batch size {size} fitted once and failed the longer trial that was to confirm it: the formula says no" for size in failed
    ]


def test_a_size_below_the_wall_that_fails_is_survived() -> None:
    class Padded(SyntheticProber):
        """Sizes above 256 that are no multiple of 64 are padded to nothing that fits."""

        def probe(self, batch_size: int, *, steps: int = 3, confirm: bool = False) -> Probe:
            padded = 100_000 if batch_size > 256 and batch_size % 64 else batch_size
            return dataclasses.replace(super().probe(padded, steps=steps, confirm=confirm), batch_size=batch_size)

    for global_batch in (None, 1000):
        prober = Padded(SyntheticWorkload(**CARD), readable=False)
        plan = Run(prober, PlanRequest(global_batch_size=global_batch), SearchOptions()).plan()
        assert plan.probes[-1].confirmation
        assert plan.probes[-1].outcome.fits
        assert plan.batch_size == plan.probes[-1].batch_size


def test_a_neighbour_that_takes_what_the_margin_has_costs_nothing() -> None:
    plan = plan_of({"neighbours": (0,)})
    assert (plan.budget, plan.batch_size) == (24 * GIB, plan_of().batch_size)


def test_a_neighbour_that_comes_during_the_search_is_reckoned_with() -> None:
    plan = plan_of({"neighbours": (10 * GIB,)}, tolerance=0)
    largest = SyntheticWorkload(**{**CARD, "capacity": 14 * GIB}).largest_fit()
    assert (plan.batch_size, plan.budget, plan.cap) == (largest, 14 * GIB, 14 * GIB)
    assert [p.outcome.fits for p in plan.probes if p.confirmation] == [False, True]
    assert (
        "during the search the memory that can be had fell from 24.00 GiB to 14.00 GiB: neighbour (pid 4121) 10.00 GiB came; "
        "the answer was confirmed within what was left"
    ) in plan.notes


def test_a_neighbour_beside_whom_the_answer_still_fits_is_told() -> None:
    plan = plan_of({"neighbours": (10 * GIB,)}, max_batch_size=100)
    assert (plan.batch_size, plan.budget) == (100, 14 * GIB)
    assert any("fell from 24.00 GiB to 14.00 GiB" in note for note in plan.notes)


def test_neighbours_that_come_twice_end_the_search() -> None:
    message = (
        r"Memory on synthetic went to others twice during the search: batch size \d+ fitted, and at its confirmation only 9.00 GiB "
        r"could be had; others hold neighbour \(pid 4121\) 5.00 GiB. Next: try again when they have ended"
    )
    with pytest.raises(DeviceUnavailable, match=message):
        plan_of({"neighbours": (10 * GIB, 5 * GIB)})


def test_a_driver_that_spills_is_found_out_by_the_time() -> None:
    plan = plan_of({"spill": 10.0, "row_seconds": 0.001}, readable=False, tolerance=0)
    assert plan.batch_size == SyntheticWorkload(**CARD).largest_fit()
    assert {p.outcome.value for p in plan.probes if not p.outcome.fits} == {"tight"}
    assert next(p.message for p in plan.probes if not p.outcome.fits) == (
        "a row took 10.0 times as long as in a smaller batch: the driver has likely moved memory to the host"
    )


def test_nothing_fits_says_what_is_needed_and_what_there_is() -> None:
    with pytest.raises(
        NoBatchSizeFits, match=r"Not even batch size 1 fits: a trial may use 1\.00 GiB .* needs more than 2\.00 GiB"
    ) as caught:
        plan_of({"capacity": GIB})
    assert (caught.value.batch_size, caught.value.available, caught.value.exit_code) == (1, GIB, 4)
    with pytest.raises(NoBatchSizeFits, match="Not even batch size 1 fits"):
        plan_of({"confirmation": 20.0}, max_batch_size=1)


@pytest.mark.parametrize(
    ("options", "batch_size", "limited_by"),
    [
        ({"max_batch_size": 64}, 64, "max_batch_size"),
        ({"max_batch_size": 70, "multiple_of": 32}, 64, "max_batch_size"),
        ({"multiple_of": 64, "tolerance": 0}, 448, "memory"),
        ({"min_batch_size": 300, "tolerance": 0}, 450, "memory"),
        ({"dataset_size": 100}, 100, "dataset"),
        ({"dataset_size": 100, "multiple_of": 8}, 96, "dataset"),
        ({"global_batch_size": 128}, 128, "global_batch_size"),
        ({"global_batch_size": 128, "max_batch_size": 65}, 64, "max_batch_size"),
    ],
)
def test_what_bounds_the_answer_is_named(options: dict[str, Any], batch_size: int, limited_by: str) -> None:
    plan = plan_of(**options)
    assert (plan.batch_size, plan.limited_by) == (batch_size, limited_by)
    assert all(p.batch_size % options.get("multiple_of", 1) == 0 for p in plan.probes)
    assert plan.probes[-1].batch_size == batch_size
    assert plan.probes[-1].confirmation


def test_a_global_batch_beyond_memory_is_accumulated_in_equal_parts() -> None:
    plan = plan_of(global_batch_size=1000)
    assert (plan.batch_size, plan.accumulation_steps, plan.global_batch_size) == (334, 3, 1002)
    assert plan.probes[-1].batch_size == 334


SPEED = {"step_seconds": 0.1, "row_seconds": 0.01}


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize(("fast_enough", "knee"), [(0.97, 186), (0.9, 74), (0.5, 10)])
def test_throughput_times_the_predicted_knee_and_returns_it_confirmed(readable: bool, fast_enough: float, knee: int) -> None:
    plan = plan_of(SPEED, readable=readable, objective="throughput", fast_enough=fast_enough, tolerance=0)
    assert (plan.batch_size, plan.limited_by, plan.best) == (knee, "throughput", 450)
    assert sizes(plan)[-2:] == [str(knee), f"{knee} confirmed"]
    times = {size: (0.1 + 0.01 * size) for size in (knee, knee - 1, 450)}
    rates = {size: size / seconds for size, seconds in times.items()}
    assert rates[knee] >= fast_enough * rates[450] > rates[knee - 1]


def test_every_plan_keeps_the_line_through_its_step_times() -> None:
    line = plan_of(SPEED).throughput
    assert line is not None
    assert (line.seconds_per_batch, line.seconds_per_sample) == (pytest.approx(0.1), pytest.approx(0.01))
    assert (line.holds, line.fraction, line.knee) == (True, 0.97, 186)
    assert plan_of().throughput is None


def test_step_times_that_go_in_tiles_are_measured_at_whole_tiles() -> None:
    plan = plan_of({"step_seconds": 0.05, "row_seconds": 0.01, "tile": 64}, objective="throughput", tolerance=0)
    assert (plan.batch_size, plan.limited_by, plan.best) == (128, "throughput", 450)
    assert {"448", "128", "128 confirmed"} <= set(sizes(plan))
    assert plan.throughput is not None
    assert not plan.throughput.holds
    assert any(note.startswith("step times are up to") and "multiples of 64 and of 8" in note for note in plan.notes)


def test_a_throughput_size_that_fails_its_confirmation_sends_the_search_below() -> None:
    plan = plan_of({**SPEED, "confirmation": 5.0}, objective="throughput", tolerance=0)
    tried = [probe for probe in plan.probes if probe.confirmation]
    assert [probe.outcome.fits for probe in tried] == [False] * (len(tried) - 1) + [True]
    assert len(tried) > 1
    assert plan.batch_size == tried[-1].batch_size < tried[-2].batch_size


def test_where_rows_are_free_memory_is_the_limit() -> None:
    plan = plan_of({"step_seconds": 0.1}, readable=False, objective="throughput", tolerance=0, max_batch_size=256)
    assert (plan.batch_size, plan.limited_by) == (256, "max_batch_size")


def test_a_global_batch_says_what_the_size_is_whatever_the_objective() -> None:
    plan = plan_of(SPEED, objective="throughput", global_batch_size=640)
    assert (plan.batch_size, plan.accumulation_steps, plan.limited_by) == (320, 2, "memory")


def test_a_time_limit_returns_the_best_by_then() -> None:
    plan = plan_of(time_limit=1e-9)
    assert (plan.batch_size, plan.limited_by, plan.exact) == (1, "time_limit", False)
    assert sizes(plan) == ["1", "1 confirmed"]


def test_progress_sees_the_setting_then_each_trial_before_and_after() -> None:
    events: list[Any] = []
    plan = plan_of(progress=events.append)
    assert isinstance(events[0], Setting)
    assert [type(event) for event in events[1:]] == [Trying, Probe] * len(plan.probes)
    assert [event for event in events if isinstance(event, Probe)] == list(plan.probes)


def test_what_the_target_names_counts_where_nothing_else_was_asked() -> None:
    prober = SyntheticProber(SyntheticWorkload(**CARD))
    object.__setattr__(prober.setting, "defaults", {"max_batch_size": 32, "epochs": 2, "dataset_size": 320, "base_lr": 0.5})
    plan = Run(prober, PlanRequest(epochs=3), SearchOptions()).plan()
    assert (plan.batch_size, plan.total_steps, plan.base_lr, plan.dataset_size) == (32, 30, 0.5, 320)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_batch_size": 0}, "min_batch_size is 0; a batch has at least one row"),
        ({"max_batch_size": -3}, "max_batch_size is -3"),
        ({"min_batch_size": 9, "max_batch_size": 8}, "min_batch_size 9 is above max_batch_size 8"),
        ({"multiple_of": 64, "max_batch_size": 32}, "No multiple of 64 lies between 1 and 32"),
        ({"steps": 1}, "steps is 1; 2 or more are needed"),
        ({"tolerance": 1.0}, r"tolerance is 1\.0"),
        ({"time_limit": 0}, "time_limit is 0"),
        ({"base_lr": float("nan")}, "base_lr is nan"),
        ({"lr_rule": "cubic"}, "lr_rule is 'cubic'; known: linear, sqrt, none, noise"),
        ({"objective": "speed"}, "objective is 'speed'"),
        ({"fast_enough": 1.0}, r"fast_enough is 1\.0; a fraction between 0 and 1"),
        ({"fast_enough": float("nan")}, "fast_enough is nan"),
        ({"epochs": 0}, "epochs is 0"),
    ],
)
def test_options_that_cannot_be_meant_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        plan_of(**options)


@pytest.mark.parametrize(("drop_last", "largest"), [(False, 26), (True, 25)])
def test_a_devices_share_of_the_data_set_is_the_limit_as_the_sampler_makes_it(drop_last: bool, largest: int) -> None:
    plan = plan_of(dataset_size=103, world_size=4, drop_last=drop_last)
    assert (plan.batch_size, plan.limited_by) == (largest, "dataset")
