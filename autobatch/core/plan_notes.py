"""What a plan's reader should know before trusting it, each note with its remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch.core.epochs import share
from autobatch.core.options import PlanRequest
from autobatch.core.records import SearchSpace, Setting
from autobatch.core.units import counted

if TYPE_CHECKING:
    from autobatch.core.plan import BatchPlan

NO_OPTIMIZER = (
    "no optimizer given: its step and its state are not counted, so training needs more memory than was measured; pass optimizer="
)


def plan_notes(plan: BatchPlan, setting: Setting, request: PlanRequest, space: SearchSpace) -> list[str]:
    """Return what to know about ``plan``: how it was measured, then what its sizes mean, then how sure the search is."""
    notes = [*setting.notes]
    if setting.mode == "train" and not setting.has_optimizer:
        notes.append(NO_OPTIMIZER)
    notes += [note for probe in plan.probes for note in probe.notes]
    if setting.mode == "train" and setting.has_batch_norm:
        notes += _batch_norm(plan)
    return notes + _global_batch(plan, request) + _data_set(plan) + _speed(plan) + _search(plan, space)


def _batch_norm(plan: BatchPlan) -> list[str]:
    if plan.batch_size == 1:
        return [
            "batch size 1 with BatchNorm: every row is normalised by itself, and a channel with one value raises an error; "
            'make room for 2 rows (precision="bf16", a smaller sample) or use GroupNorm'
        ]
    if plan.last_batch_size == 1:
        return ["the last batch of an epoch has 1 row, which BatchNorm cannot normalise: pass drop_last=True to the DataLoader"]
    return []


def _global_batch(plan: BatchPlan, request: PlanRequest) -> list[str]:
    wanted = request.global_batch_size
    if wanted is None or plan.global_batch_size == wanted:
        return []
    steps = f" × {plan.accumulation_steps:,} accumulation steps" if plan.accumulation_steps > 1 else ""
    devices = f" × {plan.world_size:,} devices" if plan.world_size > 1 else ""
    return [
        f"the global batch is {plan.global_batch_size:,}, not the {wanted:,} asked for, so that its parts are equal: "
        f"{plan.batch_size:,} rows{steps}{devices}; the learning rate is for {plan.global_batch_size:,}"
    ]


def _data_set(plan: BatchPlan) -> list[str]:
    rows = plan.dataset_size
    if rows is None:
        return ["epochs given without a data set's size: pass dataset_size= for the total steps"] if plan.epochs else []
    return _sizes(plan, rows) + _shares(plan, rows)


def _sizes(plan: BatchPlan, rows: int) -> list[str]:
    if plan.global_batch_size > rows:
        return [
            f"the data set's {rows:,} rows are fewer than the global batch of {plan.global_batch_size:,}: "
            "an epoch is one optimizer step over what there is"
        ]
    if plan.limited_by == "dataset" and plan.steps_per_epoch == 1:
        return [f"all {rows:,} rows of the data set are in one batch: an epoch is one optimizer step; max_batch_size= gives more"]
    return []


def _shares(plan: BatchPlan, rows: int) -> list[str]:
    over = rows % plan.world_size
    if not over or plan.drop_last:
        return []
    repeated = plan.world_size - over
    return [
        f"{rows:,} rows over {plan.world_size:,} devices: DistributedSampler repeats {counted(repeated, 'row')} an epoch so that all have "
        f"{share(rows, plan.world_size):,}; drop_last=True leaves out {over:,} instead"
    ]


def _speed(plan: BatchPlan) -> list[str]:
    line = plan.throughput
    if plan.limited_by != "throughput" or line is None or line.residual is None or line.holds:
        return []
    return [
        f"step times are up to {line.residual:.0%} off a + b × rows, because kernels work in whole tiles or the machine was busy: the "
        "batch size is the smallest of those timed, multiples of 64 and of 8 among them, that is fast enough; there may be a smaller one"
    ]


def _search(plan: BatchPlan, space: SearchSpace) -> list[str]:
    """Return how far the best size is from proven, where the answer depends on it."""
    following = plan.best + space.multiple_of
    if plan.exact or following > space.last or plan.limited_by == "throughput":
        return []
    if plan.wall_kind == "predicted" and plan.wall is not None:
        return [
            f"not exact: next untested size is {following:,}; from {plan.wall:,} on, the memory that the probes used predicts "
            "that it does not fit; tolerance=0 proves it with a trial that fails"
        ]
    remedy = "a longer time_limit= goes on from there" if plan.limited_by == "time_limit" else "tolerance=0 leaves none untested"
    return [f"not exact: next untested size is {following:,}; {remedy}"]
