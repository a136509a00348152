"""The prober that runs trials in this process and leaves everything as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import platform
from collections.abc import Callable, Mapping
from typing import Any

import torch

from autobatch._version import __version__
from autobatch.core.errors import WorkloadFailed
from autobatch.core.records import MemoryReading, Outcome, Probe, Setting
from autobatch.devices.base import Device, narrowed, set_budget
from autobatch.devices.forget import first_line
from autobatch.devices.oom import is_sticky
from autobatch.probe.host import HostMemory
from autobatch.probe.measure import LEFT_BEHIND, NOT_FINITE, measure
from autobatch.simulate.foresight import Expected, nothing
from autobatch.workload.state import Snapshot, resident_bytes
from autobatch.workload.workload import Workload


class InlineProber:
    """Probes in this process: takes the workload's state when made, puts it back when closed.

    Args:
        workload: the training step.
        device: where it runs.
        memory_budget: bytes, text or fraction; ``None`` for all the device can give.
        margin: fraction of the budget kept free during every trial.
        settled: the setting of a worker that this one replaces: one search has one limit.
        ran_before: whether a trial of this workload fitted before, in a worker that this one replaces.
        keep_state: whether the caller needs model, optimizer and random state back afterwards; not so in a worker, which may break.
        defaults: plan options that came with the workload.
        foreseen: returns what a step is expected to need, as (batch size, bytes), and what to say of it; asked last, once the model is on
            the device. With nothing expected, a search begins at the smallest size.

    Attributes:
        worn: whether a trial left memory behind or broke this process's use of the device: a worker should be replaced.

    Raises:
        InvalidRequest: budget or margin cannot be meant.
    """

    def __init__(
        self,
        workload: Workload,
        device: Device,
        *,
        memory_budget: int | float | str | None = None,
        margin: float = 0.05,
        settled: Setting | None = None,
        keep_state: bool = True,
        ran_before: bool = False,
        defaults: Mapping[str, Any] | None = None,
        foreseen: Callable[[], tuple[Expected, str]] = nothing,
    ) -> None:
        self._workload, self._device, self._first, self._ran = workload, device, True, ran_before
        self._keep_state, self._best, self._broken, self.worn = keep_state, 0, False, False
        with contextlib.ExitStack() as stack:
            self._snapshot = Snapshot(workload.model, workload.optimizer, torch.device(device.name), copies=keep_state, also=workload.held)
            stack.callback(self._snapshot.restore)
            stack.enter_context(device.session())
            self._resident = resident_bytes(workload.model, workload.optimizer)
            gc.collect()  # garbage that is freed during a trial would be missing from its peak
            device.release()
            self.setting = settled or self._read_setting(memory_budget, margin, defaults or {}, foreseen)
            self._host = HostMemory(workload, device)
            self._stack = stack.pop_all()

    def probe(self, batch_size: int, *, steps: int = 3, confirm: bool = False) -> Probe:
        """Return what ``steps`` training steps of ``batch_size`` rows did.

        Raises:
            WorkloadFailed: an error has left this process unable to use the device, now or in an earlier trial.
            Exception: what the user's code raises that is not about memory, with the batch size noted on it.
        """
        if self._broken:
            raise WorkloadFailed(
                f"Batch size {batch_size} was not tried: an earlier trial has left this process unable to use {self._device.name}. Start a "
                "new process; find(…, isolate=True) probes in workers, which are replaced.",
                batch_size=batch_size,
            )
        if confirm:
            self._read_again()
        refused = self._host.refuses(batch_size, self.setting.cap)
        if refused is not None:
            return dataclasses.replace(refused, confirmation=confirm)
        try:
            probe = measure(
                self._workload,
                self._device,
                batch_size,
                steps=steps,
                cap=self.setting.cap - self._host.share(batch_size),
                drop=self._snapshot.drop_created,
                ran_before=self._ran,
                confirmation=confirm,
            )
        except Exception as error:
            if is_sticky(error):
                return self._crashed(error, batch_size, confirm)
            _name_size(error, batch_size)
            raise
        self.worn = self.worn or any(note.startswith(LEFT_BEHIND) for note in probe.notes)
        probe = self._host.counted(probe)
        self._best = max(self._best, batch_size if probe.outcome.fits else 0)
        if not self._first:
            # The trials' own updates drift, so only the first trial says anything about the user's loss.
            probe = dataclasses.replace(probe, notes=tuple(note for note in probe.notes if note != NOT_FINITE))
        self._first, self._ran = False, self._ran or probe.outcome.fits
        return probe

    def close(self) -> None:
        """Put the workload's state back; a second call does nothing."""
        try:
            self._stack.close()
        except RuntimeError as error:
            # What lies on a device that this process has lost cannot be put back; the trial's own error has said so.
            if not (self._broken and is_sticky(error)):
                raise

    def _crashed(self, error: Exception, batch_size: int, confirm: bool) -> Probe:
        """Return the wall that a size is which broke a worker's use of the device; the device must not be touched any more.

        Raises:
            WorkloadFailed: this is no worker, and nothing here can use the device again.
            Exception: ``error`` itself, where one row breaks the device: that is no matter of size.
        """
        self._broken = self.worn = True
        if self._keep_state:
            raise WorkloadFailed(_what_broke(error, batch_size, self._best, self._device.name), batch_size=batch_size) from error
        if batch_size == 1 and not self._ran:
            _name_size(error, batch_size)
            raise error
        message = f"{first_line(error)} (the worker could not use {self._device.name} any more and was replaced)"
        return Probe(batch_size=batch_size, outcome=Outcome.CRASHED, confirmation=confirm, message=message)

    def _read_again(self) -> None:
        """Narrow budget and cap where a neighbour has come: an answer is confirmed within what can be had then."""
        self.setting = narrowed(self.setting, self._reading()) or self.setting

    def _reading(self) -> MemoryReading:
        """Return the device's memory now; what the workload holds is its own to use."""
        reading = self._device.memory()
        return dataclasses.replace(reading, held=max(reading.held, self._resident))

    def _read_setting(
        self,
        memory_budget: int | float | str | None,
        margin: float,
        defaults: Mapping[str, Any],
        foreseen: Callable[[], tuple[Expected, str]],
    ) -> Setting:
        workload, device = self._workload, self._device
        reading = self._reading()
        budget, cap, narrowing = set_budget(reading, memory_budget, margin)
        expected, said = foreseen()
        return Setting(
            device=device.name,
            device_description=device.description,
            reading=reading,
            budget=budget,
            cap=cap,
            margin=margin,
            resident=self._resident,
            mode=workload.mode,
            precision=workload.precision,
            has_optimizer=workload.optimizer is not None,
            has_batch_norm=workload.has_batch_norm,
            group_lrs=workload.group_lrs,
            group_options=workload.group_options,
            batch_norm_momentum=workload.batch_norm_momentum,
            optimizer_name=type(workload.optimizer).__name__ if workload.optimizer else "",
            dataset_size=workload.dataset_size,
            environment=environment() | device.environment(),
            notes=(*reading.notes, *narrowing, *workload.notes, *device.notes, *((said,) if said else ())),
            defaults=defaults,
            spills=device.spills,
            expected=expected,
        )


def environment() -> dict[str, str]:
    """Return the versions an answer depends on."""
    return {
        "autobatch": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _what_broke(error: Exception, batch_size: int, best: int, device: str) -> str:
    known = f"Batch size {best} was the largest that fitted before it" if best else "No batch size had fitted before it"
    return (
        f"The training step at batch size {batch_size} left this process unable to use {device}: {first_line(error)}. {known}. "
        "Likely an index beyond 32 bits in a kernel (a batch too large for it), or a label or token outside its table. Next: start a new "
        "process and probe with find(…, isolate=True), which survives this in workers and goes on with smaller sizes; "
        "CUDA_LAUNCH_BLOCKING=1 shows the line that failed."
    )


def _name_size(error: Exception, batch_size: int) -> None:
    """Note the batch size on the user's error; Python 3.10 keeps the note but does not print it."""
    note = f"autobatch: this was raised by the training step at batch size {batch_size}; it is not about memory."
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:  # pragma: no cover: Python 3.10
        error.__notes__ = [*getattr(error, "__notes__", []), note]  # type: ignore[attr-defined]
