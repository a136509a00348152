"""The answer: probes and a request become a batch size, accumulation steps, a learning rate, epochs and notes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autobatch.core.accumulation import micro_batch as micro_batch
from autobatch.core.epochs import epoch
from autobatch.core.errors import InvalidRequest
from autobatch.core.for_training import ForTraining
from autobatch.core.options import PlanRequest
from autobatch.core.plan_notes import plan_notes
from autobatch.core.record_json import from_plain, to_plain
from autobatch.core.records import Probe, SearchSpace, Setting
from autobatch.core.scaling import WARMUP_EPOCHS, GroupRates, Scaled, group_rates, what_scales
from autobatch.core.text import plain
from autobatch.core.throughput import Throughput, fit_throughput, step_times
from autobatch.core.units import divide_up

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan(ForTraining):
    """The batch size that provably fits and what it means for training. Bytes are ints, times are seconds, unknown is ``None``.

    Attributes:
        batch_size: rows in a batch, per device; it was run and fitted.
        accumulation_steps: batches per device in one optimizer step.
        world_size: devices training together.
        global_batch_size: rows one optimizer step sees: batch size × accumulation steps × world size.
        lr: learning rate for that global batch; with several parameter groups, of the first one that has a rate above zero.
        group_lrs: learning rate of every parameter group of the optimizer, in order.
        lr_scale: ``lr / base_lr``.
        lr_rule: name of the scaling rule that was applied.
        lr_formula: its formula with figures, ``"0.1 × 512 / 256"``.
        base_lr: learning rate the scaling started from.
        base_batch_size: global batch size ``base_lr`` belongs to.
        noise_scale: gradient noise scale in rows that the rule was given.
        optimizer_name: class name of the optimizer the plan was made for, empty without one.
        optimizer_lrs: learning rate that each of its parameter groups had, in order.
        scaling: everything that the rule scales and how, learning rates first.
        warmup_steps: optimizer steps of a linear ramp from ``base_lr`` to ``lr``; 0 when the rate was not scaled up.
        dataset_size: rows in the data set.
        drop_last: whether a last batch that is not full is left out, and rows that do not share out over the devices.
        iterations_per_epoch: batches a device runs per epoch.
        steps_per_epoch: optimizer steps per epoch.
        last_batch_size: rows in the last batch of an epoch, per device; ``batch_size`` when the data set divides evenly.
        epochs: passes over the data set.
        total_steps: optimizer steps in all epochs.
        limited_by: ``"memory"``, ``"max_batch_size"``, ``"dataset"``, ``"global_batch_size"``, ``"throughput"``,
            ``"kernel_limit"``, ``"crash"`` or ``"time_limit"``.
        best: largest batch size that was run and fitted.
        wall: smallest batch size known not to fit.
        wall_kind: ``"probed"`` when the wall was run, ``"predicted"`` when the memory model gave it.
        exact: whether the next permitted size above ``best`` is known not to fit.
        evidence: ``"measured"`` or ``"simulated"``.
        low, high: batch sizes between which the true maximum is expected, where the evidence is simulated.
        peak_allocated: bytes allocated to tensors at the highest point of a step.
        peak_reserved: bytes the caching allocator held at its highest.
        budget: bytes the training step may use, margin included.
        cap: bytes a trial could use: the budget less the margin.
        headroom: bytes of the budget that were left at the highest point, by what was reserved, else allocated.
        margin: fraction of the budget kept free.
        seconds_per_step: median wall time of one batch.
        samples_per_second: rows per second on one device.
        throughput: the line through the probes' step times, where two sizes were timed.
        device: device name as torch writes it.
        device_description: what the device is.
        environment: versions and machine, name to text.
        notes: what to know before trusting the plan.
        probes: every trial, in order.
    """

    batch_size: int
    accumulation_steps: int = 1
    world_size: int = 1
    global_batch_size: int
    lr: float | None = None
    group_lrs: tuple[float, ...] = ()
    lr_scale: float | None = None
    lr_rule: str | None = None
    lr_formula: str | None = None
    base_lr: float | None = None
    base_batch_size: int = 256
    noise_scale: float | None = None
    optimizer_name: str = ""
    optimizer_lrs: tuple[float, ...] = ()
    scaling: tuple[Scaled, ...] = ()
    warmup_steps: int | None = None
    dataset_size: int | None = None
    drop_last: bool = False
    iterations_per_epoch: int | None = None
    steps_per_epoch: int | None = None
    last_batch_size: int | None = None
    epochs: int | None = None
    total_steps: int | None = None
    limited_by: str
    best: int
    wall: int | None = None
    wall_kind: str | None = None
    exact: bool
    evidence: str = "measured"
    low: int | None = None
    high: int | None = None
    peak_allocated: int | None = None
    peak_reserved: int | None = None
    budget: int
    cap: int
    headroom: int | None = None
    margin: float
    seconds_per_step: float | None = None
    samples_per_second: float | None = None
    throughput: Throughput | None = None
    device: str
    device_description: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    probes: tuple[Probe, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as dicts, lists, texts and numbers alone, with the ``"schema"`` they follow."""
        return {"schema": SCHEMA, **to_plain(self)}

    def __str__(self) -> str:
        parts = [f"batch size {self.batch_size:,}"]
        if self.accumulation_steps > 1:
            parts.append(f"{self.accumulation_steps:,} accumulation steps")
        if self.lr is not None:
            parts.append(f"learning rate {self.lr:.3g}")
        parts.append(f"limited by {self.limited_by}")
        return "\n".join([plain(", ".join(parts)), *(f"- {plain(note)}" for note in self.notes)])

    def to_json(self) -> str:
        """Return the plan as strict JSON that ``from_json`` reads back to an equal plan."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> BatchPlan:
        """Return the plan that ``to_json`` wrote as ``text``.

        Raises:
            InvalidRequest: the text is not a plan, or is one that a newer autobatch wrote.
        """
        again = 'Write it again with "autobatch probe TARGET --json" or plan.to_json().'
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"The plan is not JSON: {error}. It may be cut off. {again}") from None
        schema = data.get("schema") if isinstance(data, dict) else None
        if type(schema) is not int:
            raise InvalidRequest(f"The JSON is not a plan of autobatch: it has no schema number. {again}")
        if schema > SCHEMA:
            raise InvalidRequest(
                f"The plan has schema {schema}; this autobatch reads up to {SCHEMA}. "
                'A newer autobatch wrote it: "pip install --upgrade torch-autobatch" reads it.'
            )
        try:
            return from_plain(cls, data)
        except ValueError as error:
            raise InvalidRequest(f"The plan is damaged: {error}. {again}") from None


def make_plan(
    *,
    setting: Setting,
    request: PlanRequest,
    space: SearchSpace,
    probes: Sequence[Probe],
    batch_size: int,
    best: int,
    wall: int | None,
    wall_kind: str | None,
    limited_by: str,
    exact: bool,
    notes: Sequence[str] = (),
) -> BatchPlan:
    """Return the plan for ``batch_size`` rows per device, which one of ``probes`` must have found to fit.

    Raises:
        InvalidRequest: the learning-rate rule gives no usable learning rate.
        ValueError: no probe found the batch size to fit.
    """
    rows = batch_size * request.world_size
    steps = 1 if request.global_batch_size is None else divide_up(request.global_batch_size, rows)
    rates = group_rates(setting, request, rows * steps)
    plan = BatchPlan(
        batch_size=batch_size,
        accumulation_steps=steps,
        world_size=request.world_size,
        global_batch_size=rows * steps,
        best=best,
        wall=wall,
        wall_kind=wall_kind,
        limited_by=limited_by,
        exact=exact,
        evidence=setting.evidence,
        probes=tuple(probes),
        throughput=fit_throughput(step_times(probes), request.fast_enough),
        **_epoch_fields(setting, request, batch_size, steps),
        **_rate_fields(rates, setting, request),
        **_measured_fields(setting, probes, batch_size),
    )
    plan = replace(plan, warmup_steps=_warmup_steps(plan))
    plan = replace(plan, scaling=what_scales(plan, setting, request, rates))
    return replace(plan, notes=tuple(dict.fromkeys((*plan_notes(plan, setting, request, space), *rates.notes, *notes))))


def _epoch_fields(setting: Setting, request: PlanRequest, batch_size: int, accumulation_steps: int) -> dict[str, Any]:
    rows = request.dataset_size if request.dataset_size is not None else setting.dataset_size
    asked = {"epochs": request.epochs, "drop_last": request.drop_last}
    if rows is None:
        return asked
    one = epoch(rows, batch_size, world_size=request.world_size, accumulation_steps=accumulation_steps, drop_last=request.drop_last)
    return asked | {
        "dataset_size": rows,
        "iterations_per_epoch": one.iterations,
        "steps_per_epoch": one.updates,
        "last_batch_size": one.last_batch_size,
        "total_steps": None if request.epochs is None else one.updates * request.epochs,
    }


def _rate_fields(rates: GroupRates, setting: Setting, request: PlanRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "base_batch_size": request.base_batch_size,
        "base_lr": rates.base_lr,
        "group_lrs": rates.lrs,
        "noise_scale": request.noise_scale,
        "optimizer_name": setting.optimizer_name,
        "optimizer_lrs": setting.group_lrs if rates.lrs else (),
    }
    if rates.scaled is not None:
        scaled = rates.scaled
        fields |= {"lr": scaled.lr, "lr_scale": scaled.scale, "lr_rule": scaled.rule, "lr_formula": scaled.formula}
    return fields


def _measured_fields(setting: Setting, probes: Sequence[Probe], batch_size: int) -> dict[str, Any]:
    fits = [probe for probe in probes if probe.batch_size == batch_size and probe.outcome.fits]
    if not fits:
        raise ValueError(f"batch size {batch_size} was never found to fit, so no plan may return it")
    # The last trial of a size is the longest one, so its times are the steadiest.
    timed = next((probe for probe in reversed(fits) if probe.seconds_per_step is not None), fits[-1])
    allocated = max((p.peak_allocated for p in fits if p.peak_allocated is not None), default=None)
    reserved = max((p.peak_reserved for p in fits if p.peak_reserved is not None), default=None)
    used = allocated if reserved is None else reserved
    return {
        "peak_allocated": allocated,
        "peak_reserved": reserved,
        "budget": setting.budget,
        "cap": setting.cap,
        "headroom": None if used is None else setting.budget - used,
        "margin": setting.margin,
        "seconds_per_step": timed.seconds_per_step,
        "samples_per_second": timed.samples_per_second,
        "device": setting.device,
        "device_description": setting.device_description,
        "environment": dict(setting.environment),
    }


def _warmup_steps(plan: BatchPlan) -> int | None:
    if plan.lr_scale is None:
        return None
    if plan.lr_scale <= 1:
        return 0
    return None if plan.steps_per_epoch is None else plan.steps_per_epoch * min(WARMUP_EPOCHS, plan.epochs or WARMUP_EPOCHS)
