"""One measured batch size: run the steps under the cap, read the peaks by phase, give everything back."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from autobatch.core.records import Outcome, Peak, Probe
from autobatch.core.units import MIB, format_bytes
from autobatch.devices.base import Device
from autobatch.devices.forget import first_line, forget
from autobatch.workload.batches import to_device
from autobatch.workload.state import resident_bytes
from autobatch.workload.workload import Workload

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# A few blocks may stay for good reasons (kernels loaded, workspaces); more than this is a leak worth telling.
_LEAK = 16 * MIB
# From this much on, a trial may have left tensors in reference cycles.
_CYCLES = MIB

LEFT_BEHIND = "a trial left "
SPURIOUS = (
    "this size ran out of memory at its first try and not at its second, after waiting for the device: memory that was freed on another "
    "stream came back late"
)
NO_LOSS = "no loss_fn given: the sum of the model's outputs stood in for the loss; your real loss may need more memory"
NOT_FINITE = "the loss was not finite in the first step; memory does not depend on it, your training does"


@dataclass(slots=True)
class _Readings:
    """What the steps of one trial leave behind, also when one of them fails."""

    outcome: Outcome = Outcome.FIT
    message: str = ""
    retries: int | None = None
    steps: int = 0
    seconds: list[float] = field(default_factory=list)
    peaks: dict[str, Peak] = field(default_factory=dict)
    first_loss: float | None = None

    def add_peak(self, phase: str, peak: Peak) -> None:
        """Keep the higher of ``peak`` and the one known for ``phase``."""
        known = self.peaks.get(phase)
        if known is not None:
            reserved = None if peak.reserved is None else max(peak.reserved, known.reserved or 0)
            peak = Peak(allocated=max(peak.allocated, known.allocated), reserved=reserved)
        self.peaks[phase] = peak


def measure(
    workload: Workload,
    device: Device,
    batch_size: int,
    *,
    steps: int,
    cap: int,
    drop: Callable[[], None],
    ran_before: bool = False,
    confirmation: bool = False,
) -> Probe:
    """Return what ``steps`` full training steps of ``batch_size`` rows did under ``cap`` bytes.

    ``drop`` frees what the steps added to the model and the optimizer; ``ran_before`` says that fewer rows have fitted.

    Raises:
        Exception: whatever the user's code raises that is not about memory, as it is.
    """
    before, started, notes = device.allocated(), time.perf_counter(), []
    readings = _try(workload, device, batch_size, steps, cap, ran_before)
    # Without a cache nothing comes back late. An answer has to run at the first try, as it will in training.
    if readings.outcome is Outcome.OOM and readings.retries is not None and not confirmation:
        drop()
        give_back(device, before)
        readings = _try(workload, device, batch_size, steps, cap, ran_before)
        notes = [SPURIOUS] if readings.outcome.fits else []
    drop()
    return Probe(
        batch_size=batch_size,
        outcome=readings.outcome,
        steps=readings.steps,
        forward_backward=readings.peaks.get("forward_backward"),
        optimizer=readings.peaks.get("optimizer"),
        allocation_retries=readings.retries,
        driver_used=device.driver_used(),
        seconds_per_step=statistics.median(readings.seconds[1:]) if len(readings.seconds) > 1 else None,
        seconds_spread=max(readings.seconds[1:]) - min(readings.seconds[1:]) if len(readings.seconds) > 1 else None,
        seconds=time.perf_counter() - started,
        confirmation=confirmation,
        message=readings.message,
        notes=(*_notes(workload, readings), *notes, *give_back(device, before)),
    )


def _try(workload: Workload, device: Device, batch_size: int, steps: int, cap: int, ran_before: bool) -> _Readings:
    """Run the steps under the cap and return what they did; an error that is not about memory is raised."""
    readings, failure = _Readings(), None
    retries = device.retries()
    held = resident_bytes(workload.model, workload.optimizer)
    try:
        with device.cap(cap, held):
            _run(workload, device, batch_size, steps, readings)
    except Exception as error:
        verdict = device.classify(error, ran_before=ran_before)
        if verdict is None:
            raise
        readings.outcome, readings.message = verdict, first_line(error)
        failure = error
    if failure is not None:
        forget(failure)  # not in the handler: there the interpreter itself still holds the error and its frames
    if retries is not None:
        readings.retries = (device.retries() or 0) - retries
        if readings.retries > 0 and readings.outcome is Outcome.FIT:
            times = "once" if readings.retries == 1 else f"{readings.retries} times"
            readings.outcome, readings.message = Outcome.TIGHT, f"the allocator ran out and gave its cache back {times}"
    return readings


def give_back(device: Device, before: int) -> tuple[str, ...]:
    """Free what a trial left and return a note when more than a little of it stays."""
    torch.clear_autocast_cache()  # weights that were cast for a step that broke off
    device.synchronize()
    device.release()
    leaked = device.allocated() - before
    if leaked > _CYCLES:
        gc.collect()  # looks at every object of the process, which takes longer than a small step
        device.release()
        leaked = device.allocated() - before
    if leaked <= _LEAK:
        return ()
    return (
        f"{LEFT_BEHIND}{format_bytes(leaked)} behind that could not be freed, on top of {format_bytes(before)} before it: the step may "
        "keep tensors (a list of losses, a cache, a hook); keep loss.item() or tensor.detach().cpu() instead",
    )


def _run(workload: Workload, device: Device, batch_size: int, steps: int, readings: _Readings) -> None:
    """Run the steps as a plain training loop would, its variables alive until they are assigned again."""
    model, optimizer = workload.model, workload.optimizer
    target = torch.device(device.name)
    train = workload.mode == "train"
    scaler = torch.amp.GradScaler(target.type) if workload.precision == "fp16" and train else None
    model.train(train)
    with torch.set_grad_enabled(train):
        for _ in range(steps):
            device.synchronize()
            started = time.perf_counter()
            device.reset_peaks()
            batch = to_device(workload.make_batch(batch_size), target)
            with _autocast(workload, target):
                loss, output = workload.loss(model, batch)  # noqa: RUF059
            if loss is not None:
                (scaler.scale(loss) if scaler is not None else loss).backward()  # type: ignore[no-untyped-call]
            device.synchronize()
            readings.add_peak("forward_backward", device.peak())
            if optimizer is not None:
                device.reset_peaks()
                _step(optimizer, scaler)
                device.synchronize()
                readings.add_peak("optimizer", device.peak())
            model.zero_grad(set_to_none=True)
            readings.seconds.append(time.perf_counter() - started)
            readings.steps += 1
            if readings.first_loss is None and loss is not None:
                readings.first_loss = float(loss.detach())


def _step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    if scaler is None:
        optimizer.step()
        return
    scaler.step(optimizer)
    scaler.update()
    if not optimizer.state:
        # A skipped step (gradients that overflow at the first scale) would leave the optimizer's state out of the measurement.
        optimizer.step()


def _autocast(workload: Workload, target: torch.device) -> contextlib.AbstractContextManager[Any]:
    dtype = _DTYPES.get(workload.precision or "")
    if dtype is not None:
        return torch.autocast(target.type, dtype=dtype)
    return torch.autocast(target.type, enabled=False) if workload.precision == "fp32" else contextlib.nullcontext()


def _notes(workload: Workload, readings: _Readings) -> tuple[str, ...]:
    notes = []
    if workload.loss.stood_in:
        notes.append(NO_LOSS)
    if readings.first_loss is not None and not math.isfinite(readings.first_loss):
        notes.append(NOT_FINITE)
    return tuple(notes)
