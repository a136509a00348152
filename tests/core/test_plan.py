"""From probes and a request to a plan, and the plan to JSON and back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.core.accumulation import MicroBatch, micro_batch
from autobatch.core.errors import InvalidRequest
from autobatch.core.options import PlanRequest
from autobatch.core.plan import BatchPlan, make_plan
from autobatch.core.records import MemoryReading, Outcome, Peak, Probe, SearchSpace, Setting

NO_OPTIMIZER = (
    "no optimizer given: its step and its state are not counted, so training needs more memory than was measured; pass optimizer="
)
NO_RATE = "no learning rate: pass base_lr= and base_batch_size=, the global batch size it was tuned at"


def setting(**changes: Any) -> Setting:
    defaults: dict[str, Any] = {
        "device": "cuda:0", "device_description": "NVIDIA H200", "reading": MemoryReading(capacity=2000, free=1000),
        "budget": 1000, "cap": 950, "margin": 0.05, "has_optimizer": True, "group_lrs": (0.1,), "optimizer_name": "SGD",
        "environment": {"torch": "2.5"},
    }  # fmt: skip
    return Setting(**{**defaults, **changes})


def fit(batch_size: int, **changes: Any) -> Probe:
    return Probe(batch_size=batch_size, outcome=Outcome.FIT, **changes)


def plan_of(batch_size: int, at: Setting | None = None, request: PlanRequest | None = None, **changes: Any) -> BatchPlan:
    defaults: dict[str, Any] = {
        "setting": at or setting(), "request": request or PlanRequest(base_lr=0.1), "space": SearchSpace(),
        "probes": [fit(batch_size)], "batch_size": batch_size, "best": batch_size, "wall": batch_size + 1,
        "wall_kind": "probed", "limited_by": "memory", "exact": True,
    }  # fmt: skip
    return make_plan(**{**defaults, **changes})


@pytest.mark.parametrize(
    ("wanted", "world_size", "largest", "options", "shared"),
    [
        (128, 1, 65, {}, (64, 2, 128, 0)),
        (128, 1, 128, {}, (128, 1, 128, 0)),
        (128, 1, 500, {}, (128, 1, 128, 0)),
        (100, 8, 64, {}, (13, 1, 104, 4)),
        (100, 1, 40, {}, (34, 3, 102, 2)),
        (8192, 8, 96, {}, (94, 11, 8272, 80)),
        (100, 1, 60, {"multiple_of": 8}, (56, 2, 112, 12)),
        (100, 1, 63, {"multiple_of": 32}, (32, 4, 128, 28)),
        (10, 1, 64, {"smallest": 16}, (16, 1, 16, 6)),
        (1, 4, 1, {}, (1, 1, 4, 3)),
    ],
)
def test_a_global_batch_is_shared_out_equally(
    wanted: int, world_size: int, largest: int, options: dict[str, int], shared: tuple[int, ...]
) -> None:
    size, steps, effective, deviation = shared
    expected = MicroBatch(batch_size=size, accumulation_steps=steps, global_batch_size=effective, deviation=deviation)
    assert micro_batch(wanted, world_size, largest, **options) == expected


@given(st.integers(1, 10**5), st.integers(1, 64), st.integers(1, 2000), st.integers(1, 64), st.integers(1, 64))
def test_shares_keep_to_the_limits_and_take_the_fewest_steps(
    wanted: int, world_size: int, largest: int, multiple_of: int, smallest: int
) -> None:
    last, first = largest // multiple_of * multiple_of, -(-smallest // multiple_of) * multiple_of
    if first > last:
        with pytest.raises(InvalidRequest, match=f"No multiple of {multiple_of} lies between batch sizes"):
            micro_batch(wanted, world_size, largest, multiple_of, smallest)
        return
    shared = micro_batch(wanted, world_size, largest, multiple_of, smallest)
    assert first <= shared.batch_size <= last
    assert shared.batch_size % multiple_of == 0
    assert shared.global_batch_size == shared.batch_size * world_size * shared.accumulation_steps
    assert shared.deviation == shared.global_batch_size - wanted >= 0
    assert (shared.accumulation_steps - 1) * last * world_size < wanted
    if wanted < world_size:
        return
    plan = plan_of(shared.batch_size, request=PlanRequest(global_batch_size=wanted, world_size=world_size))
    assert (plan.accumulation_steps, plan.global_batch_size) == (shared.accumulation_steps, shared.global_batch_size)


@pytest.mark.parametrize(
    ("rows", "batch_size", "iterations", "last"),
    [(2000, 500, 4, 500), (1000, 100, 10, 100), (1797, 500, 4, 297), (1797, 1797, 1, 1797), (100, 200, 1, 100)],
)
def test_iterations_of_an_epoch(rows: int, batch_size: int, iterations: int, last: int) -> None:
    plan = plan_of(batch_size, request=PlanRequest(dataset_size=rows, epochs=3))
    assert (plan.iterations_per_epoch, plan.steps_per_epoch, plan.last_batch_size) == (iterations, iterations, last)
    assert (plan.dataset_size, plan.epochs, plan.total_steps) == (rows, 3, 3 * iterations)


def test_optimizer_steps_are_counted_over_accumulation_and_ranks() -> None:
    plan = plan_of(64, request=PlanRequest(dataset_size=10_001, epochs=2, global_batch_size=512, world_size=4))
    assert (plan.accumulation_steps, plan.global_batch_size) == (2, 512)
    assert plan.iterations_per_epoch == 40  # each rank's 2,501 rows, padded, in batches of 64
    assert (plan.last_batch_size, plan.steps_per_epoch, plan.total_steps) == (5, 20, 40)


@given(st.integers(1, 10**6), st.integers(1, 512), st.integers(1, 16), st.integers(1, 4096))
def test_steps_are_the_data_set_over_the_global_batch(rows: int, batch_size: int, world_size: int, wanted: int) -> None:
    wanted = max(wanted, world_size)
    plan = plan_of(batch_size, request=PlanRequest(dataset_size=rows, global_batch_size=wanted, world_size=world_size))
    assert plan.steps_per_epoch == -(-rows // plan.global_batch_size)
    assert plan.iterations_per_epoch is not None
    assert plan.last_batch_size is not None
    assert 1 <= plan.last_batch_size <= batch_size
    per_rank = (plan.iterations_per_epoch - 1) * batch_size + plan.last_batch_size
    assert per_rank == -(-rows // world_size)


def test_the_data_sets_own_size_counts_when_none_is_asked_for() -> None:
    assert plan_of(500, setting(dataset_size=2000)).iterations_per_epoch == 4
    assert plan_of(500, setting(dataset_size=2000), PlanRequest(dataset_size=1000)).iterations_per_epoch == 2
    assert plan_of(500).iterations_per_epoch is None


def test_the_learning_rate_is_for_the_global_batch() -> None:
    plan = plan_of(64, setting(group_lrs=(0.1, 0.01)), PlanRequest(global_batch_size=1024))
    assert (plan.lr, plan.lr_scale, plan.lr_rule, plan.lr_formula) == (0.4, 4, "linear", "0.1 × 1024 / 256")
    assert (plan.base_lr, plan.base_batch_size, plan.group_lrs) == (0.1, 256, pytest.approx((0.4, 0.04)))


@pytest.mark.parametrize(
    ("request_", "steps"),
    [
        (PlanRequest(dataset_size=2000, base_batch_size=250), 20),  # 4 steps an epoch, 5 epochs
        (PlanRequest(dataset_size=2000, base_batch_size=250, epochs=90), 20),
        (PlanRequest(dataset_size=2000, base_batch_size=250, epochs=2), 8),
        (PlanRequest(dataset_size=2000, base_batch_size=500), 0),
        (PlanRequest(dataset_size=2000, base_batch_size=1000), 0),
        (PlanRequest(base_batch_size=250), None),
        (PlanRequest(base_batch_size=1000), 0),
    ],
)
def test_warm_up_takes_five_epochs_when_the_rate_was_scaled_up(request_: PlanRequest, steps: int | None) -> None:
    assert plan_of(500, request=request_).warmup_steps == steps


def test_without_a_rate_there_is_no_warm_up() -> None:
    plan = plan_of(500, setting(group_lrs=(), has_optimizer=False), PlanRequest(dataset_size=2000))
    assert (plan.lr, plan.warmup_steps, plan.group_lrs) == (None, None, ())
    assert plan.notes == (NO_OPTIMIZER, NO_RATE)


def test_peaks_are_the_highest_and_times_the_latest_of_the_answers_own_probes() -> None:
    probes = [
        fit(64, forward_backward=Peak(allocated=500, reserved=600), seconds_per_step=9.0),
        fit(118, forward_backward=Peak(allocated=900, reserved=940), seconds_per_step=2.0),
        Probe(batch_size=119, outcome=Outcome.OOM, forward_backward=Peak(allocated=949, reserved=950)),
        fit(118, forward_backward=Peak(allocated=890, reserved=945), seconds_per_step=1.0, confirmation=True),
    ]
    plan = plan_of(118, probes=probes)
    assert (plan.peak_allocated, plan.peak_reserved, plan.headroom) == (900, 945, 55)
    assert (plan.seconds_per_step, plan.samples_per_second) == (1.0, 118.0)
    assert (plan.budget, plan.cap, plan.margin) == (1000, 950, 0.05)
    assert (plan.device, plan.device_description, plan.environment) == ("cuda:0", "NVIDIA H200", {"torch": "2.5"})
    assert plan.probes == tuple(probes)


def test_headroom_goes_by_what_was_allocated_where_nothing_is_reserved() -> None:
    assert plan_of(8, probes=[fit(8, forward_backward=Peak(allocated=900))]).headroom == 100
    assert plan_of(8).headroom is None


def test_a_size_that_never_fitted_is_never_planned() -> None:
    with pytest.raises(ValueError, match="batch size 8 was never found to fit"):
        plan_of(8, probes=[fit(4), Probe(batch_size=8, outcome=Outcome.TIGHT)])


def test_a_plan_with_nothing_to_say_has_no_notes() -> None:
    assert plan_of(118).notes == ()


@pytest.mark.parametrize(
    ("batch_size", "rows", "notes"),
    [
        (
            1,
            None,
            (
                "batch size 1 with BatchNorm: every row is normalised by itself, and a channel with one value raises an error; "
                'make room for 2 rows (precision="bf16", a smaller sample) or use GroupNorm',
            ),
        ),
        (
            100,
            1001,
            ("the last batch of an epoch has 1 row, which BatchNorm cannot normalise: pass drop_last=True to the DataLoader",),
        ),
        (100, 1002, ()),
        (100, None, ()),
    ],
)
def test_batch_norm_needs_two_rows(batch_size: int, rows: int | None, notes: tuple[str, ...]) -> None:
    request = PlanRequest(base_lr=0.1, dataset_size=rows)
    assert plan_of(batch_size, setting(has_batch_norm=True), request).notes == notes
    assert plan_of(batch_size, setting(has_batch_norm=False), request).notes == ()
    assert plan_of(batch_size, setting(has_batch_norm=True, mode="eval"), request).notes == ()


def test_a_global_batch_that_differs_is_told() -> None:
    assert plan_of(34, request=PlanRequest(base_lr=0.1, global_batch_size=100)).notes == (
        "the global batch is 102, not the 100 asked for, so that its parts are equal: 34 rows × 3 accumulation steps; "
        "the learning rate is for 102",
    )
    assert plan_of(13, request=PlanRequest(base_lr=0.1, global_batch_size=100, world_size=8)).notes == (
        "the global batch is 104, not the 100 asked for, so that its parts are equal: 13 rows × 8 devices; the learning rate is for 104",
    )
    assert plan_of(64, request=PlanRequest(base_lr=0.1, global_batch_size=128)).notes == ()


def test_the_limits_of_a_data_set_are_told() -> None:
    request = PlanRequest(base_lr=0.1, dataset_size=1797)
    assert plan_of(1797, request=request, limited_by="dataset").notes == (
        "all 1,797 rows of the data set are in one batch: an epoch is one optimizer step; max_batch_size= gives more",
    )
    # Only multiples of 8 were permitted: five rows are left for a second batch.
    assert plan_of(1792, request=request, limited_by="dataset").notes == ()
    assert plan_of(2000, request=request, limited_by="memory").notes == (
        "the data set's 1,797 rows are fewer than the global batch of 2,000: an epoch is one optimizer step over what there is",
    )
    assert plan_of(100, request=PlanRequest(base_lr=0.1, epochs=3)).notes == (
        "epochs given without a data set's size: pass dataset_size= for the total steps",
    )


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        ({"wall": 125}, ("not exact: next untested size is 119; tolerance=0 leaves none untested",)),
        (
            {"wall": 128, "space": SearchSpace(multiple_of=2)},
            ("not exact: next untested size is 120; tolerance=0 leaves none untested",),
        ),
        (
            {"wall": None, "wall_kind": None, "limited_by": "time_limit"},
            ("not exact: next untested size is 119; a longer time_limit= goes on from there",),
        ),
        (
            {"wall": 1210, "wall_kind": "predicted"},
            (
                "not exact: next untested size is 119; from 1,210 on, the memory that the probes used predicts that it does "
                "not fit; tolerance=0 proves it with a trial that fails",
            ),
        ),
        ({"wall": 125, "limited_by": "throughput"}, ()),
        ({"wall": None, "wall_kind": None, "space": SearchSpace(max=118)}, ()),
    ],
)
def test_an_answer_that_is_not_exact_names_the_next_size(options: dict[str, Any], notes: tuple[str, ...]) -> None:
    assert plan_of(118, exact=False, **options).notes == notes


def test_notes_come_in_order_and_once() -> None:
    probes = [fit(64, notes=("no loss", "leak")), fit(118, notes=("no loss",))]
    plan = plan_of(118, setting(notes=("no NVML", "leak")), PlanRequest(), probes=probes, notes=["batch size 1 was left out"])
    assert plan.notes == (
        "no NVML",
        "leak",
        "no loss",
        "the optimizer's learning rate 0.1 is taken to suit a global batch of 256 rows; if it was tuned at another, pass base_batch_size=",
        "batch size 1 was left out",
    )


amounts = st.integers(0, 2**50)
times = st.floats(0, 1e9)
peaks = st.builds(Peak, allocated=amounts, reserved=st.none() | amounts)
probes_ = st.builds(
    Probe, batch_size=st.integers(1, 2**20), outcome=st.sampled_from(Outcome), steps=st.integers(0, 50),
    forward_backward=st.none() | peaks, optimizer=st.none() | peaks, allocation_retries=st.none() | amounts,
    driver_used=st.none() | amounts, seconds_per_step=st.none() | times, seconds=st.none() | times, confirmation=st.booleans(),
    message=st.text(), notes=st.lists(st.text(), max_size=3).map(tuple),
)  # fmt: skip
plans = st.builds(
    BatchPlan, batch_size=st.integers(1, 2**20), global_batch_size=st.integers(1, 2**30), lr=st.none() | times,
    group_lrs=st.lists(times, max_size=3).map(tuple), lr_formula=st.none() | st.text(), limited_by=st.text(),
    best=st.integers(1, 2**20), wall=st.none() | amounts, wall_kind=st.sampled_from([None, "probed", "predicted"]),
    exact=st.booleans(), peak_allocated=st.none() | amounts, budget=amounts, cap=amounts,
    headroom=st.none() | st.integers(-(2**40), 2**40), margin=times, seconds_per_step=st.none() | times, device=st.text(),
    environment=st.dictionaries(st.text(), st.text(), max_size=3),
    notes=st.lists(st.text(), max_size=3).map(tuple), probes=st.lists(probes_, max_size=3).map(tuple),
)  # fmt: skip


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@given(plans)
def test_a_plan_survives_json(plan: BatchPlan) -> None:
    text = plan.to_json()
    assert BatchPlan.from_json(text) == plan
    assert json.loads(text, parse_constant=no_constant) == plan.to_dict()


def test_the_document_has_a_schema_and_every_field_by_its_name() -> None:
    plan = plan_of(8, probes=[fit(8, forward_backward=Peak(allocated=900))])
    data = plan.to_dict()
    assert (data["schema"], next(iter(data))) == (1, "schema")
    assert set(data) == {"schema", *(f.name for f in dataclasses.fields(BatchPlan))}
    assert (data["batch_size"], data["lr"], data["limited_by"], data["group_lrs"]) == (8, 0.003125, "memory", [0.003125])
    assert data["probes"][0]["outcome"] == "fit"
    assert data["probes"][0]["forward_backward"] == {"allocated": 900, "reserved": None}


def test_keys_from_elsewhere_are_passed_over_and_missing_ones_take_their_defaults() -> None:
    plan = plan_of(8)
    data = plan.to_dict()
    data["colour"] = "green"
    data["probes"][0]["colour"] = "green"
    del data["accumulation_steps"]
    data["margin"] = 0
    assert BatchPlan.from_json(json.dumps(data)) == dataclasses.replace(plan, margin=0.0)


OUTCOMES = "probes[0].outcome is 'fits'; known: fit, tight, oom, host_oom, kernel_limit, timeout, crashed"
AGAIN = ' Write it again with "autobatch probe TARGET --json" or plan.to_json().'


@pytest.mark.parametrize("text", ["", "batch size 8", '{"schema": 1,', "[" * 100_000, "9" * 5000, "\x00"])
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        BatchPlan.from_json(text)
    assert str(caught.value).startswith("The plan is not JSON: ") or str(caught.value).startswith("The JSON is not a plan")
    assert str(caught.value).endswith(AGAIN)


@pytest.mark.parametrize("text", ["[]", "null", "3", "{}", '{"schema": "1"}', '{"schema": true}', '{"plan": 1}'])
def test_json_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        BatchPlan.from_json(text)
    assert str(caught.value) == "The JSON is not a plan of autobatch: it has no schema number." + AGAIN


def test_a_newer_schema_is_refused_with_the_way_to_read_it() -> None:
    with pytest.raises(InvalidRequest) as caught:
        BatchPlan.from_json('{"schema": 2}')
    assert str(caught.value) == (
        'The plan has schema 2; this autobatch reads up to 1. A newer autobatch wrote it: "pip install --upgrade torch-autobatch" reads it.'
    )


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["batch_size"], "8", "batch_size is not a whole number"),
        (["batch_size"], True, "batch_size is not a whole number"),
        (["batch_size"], 8.0, "batch_size is not a whole number"),
        (["lr"], "0.1", "lr is not a number"),
        (["lr"], float("nan"), "lr is not a number"),
        (["lr"], float("inf"), "lr is not a number"),
        (["lr"], 10**400, "lr is not a number"),
        (["peak_allocated"], 2**63, "peak_allocated is beyond any amount of memory, rows or steps"),
        (["exact"], 1, "exact is not true or false"),
        (["device"], None, "device is not a text"),
        (["notes"], "a note", "notes is not a list"),
        (["notes"], [1], "notes[0] is not a text"),
        (["environment"], [], "environment is not an object"),
        (["environment"], {"torch": 2}, "environment.torch is not a text"),
        (["probes"], {}, "probes is not a list"),
        (["probes", 0], 3, "probes[0] is not an object"),
        (["probes", 0, "forward_backward"], 3, "probes[0].forward_backward is not an object"),
        (["probes", 0, "forward_backward"], {}, "probes[0].forward_backward.allocated is missing"),
        (["probes", 0, "outcome"], "fits", OUTCOMES),
    ],
)
def test_damage_is_named_where_it_is(path: list[Any], value: Any, said: str) -> None:
    data = plan_of(8).to_dict()
    inner: Any = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(InvalidRequest) as caught:
        BatchPlan.from_json(json.dumps(data))
    assert str(caught.value) == f"The plan is damaged: {said}.{AGAIN}"


@given(st.data())
def test_no_damage_ends_in_anything_but_a_refusal(data: st.DataObject) -> None:
    document = plan_of(8).to_dict()
    key = data.draw(st.sampled_from(sorted(document)))
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
        max_leaves=4,
    )
    document[key] = data.draw(values)
    with contextlib.suppress(InvalidRequest):
        assert isinstance(BatchPlan.from_json(json.dumps(document)), BatchPlan)


def test_a_document_cut_off_anywhere_is_refused() -> None:
    text = plan_of(8).to_json()
    for end in range(0, len(text) - 1, 7):
        with pytest.raises(InvalidRequest):
            BatchPlan.from_json(text[:end])


@pytest.mark.parametrize(
    ("request_", "changes", "text"),
    [
        (PlanRequest(), {"at": setting(group_lrs=()), "limited_by": "max_batch_size"}, "batch size 12,288, limited by max_batch_size"),
        (
            PlanRequest(base_lr=0.1, base_batch_size=12_288, global_batch_size=24_576),
            {},
            "batch size 12,288, 2 accumulation steps, learning rate 0.2, limited by memory",
        ),
    ],
)
def test_a_plan_is_printed_as_a_line_and_its_notes(request_: PlanRequest, changes: dict[str, Any], text: str) -> None:
    plan = plan_of(12_288, request=request_, **changes)
    assert str(plan).splitlines() == [text, *(f"- {note}" for note in plan.notes)]


def test_what_a_note_quotes_cannot_move_the_cursor_where_a_plan_is_printed() -> None:
    plan = dataclasses.replace(plan_of(8), notes=("from \x1b[2J",))
    assert "\x1b" not in str(plan)
    assert "[2J" in str(plan).splitlines()[-1]
