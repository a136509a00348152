"""The prober that runs trials in this process and leaves everything as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import platform
from collections.abc import Mapping
from typing import Any

import torch

from autobatch._version import __version__
from autobatch.core.records import Probe, Setting
from autobatch.devices.base import Device, set_budget
from autobatch.probe.measure import NOT_FINITE, measure
from autobatch.workload.state import Snapshot, resident_bytes
from autobatch.workload.workload import Workload


class InlineProber:
    """Probes in this process: takes the workload's state when made, puts it back when closed.

    Args:
        workload: the training step.
        device: where it runs.
        memory_budget: bytes, text or fraction; ``None`` for all the device can give.
        margin: fraction of the budget kept free during every trial.
        cap: bytes a trial may use, when they were settled before (a worker that replaces another).
        ran_before: whether a trial of this workload fitted before, in a worker that this one replaces.
        keep_state: whether the caller needs model, optimizer and random state back afterwards.
        defaults: plan options that came with the workload.
        expected: what a step is expected to need, as (batch size, bytes); empty for a search that begins at the smallest size.
        notes: what the user should know of all this.

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
        cap: int | None = None,
        keep_state: bool = True,
        ran_before: bool = False,
        defaults: Mapping[str, Any] | None = None,
        expected: tuple[tuple[int, int], ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        self._workload, self._device, self._first, self._ran = workload, device, True, ran_before
        with contextlib.ExitStack() as stack:
            self._snapshot = Snapshot(workload.model, workload.optimizer, torch.device(device.name), copies=keep_state)
            stack.callback(self._snapshot.restore)
            stack.enter_context(device.session())
            gc.collect()  # garbage that is freed during a trial would be missing from its peak
            device.release()
            setting = self._read_setting(memory_budget, margin, defaults or {})
            self.setting = dataclasses.replace(setting, expected=expected, notes=(*setting.notes, *notes))
            self._cap = self.setting.cap if cap is None else cap
            self._stack = stack.pop_all()

    def probe(self, batch_size: int, *, steps: int = 3, confirm: bool = False) -> Probe:
        """Return what ``steps`` training steps of ``batch_size`` rows did.

        Raises:
            Exception: what the user's code raises that is not about memory, with the batch size noted on it.
        """
        try:
            probe = measure(
                self._workload,
                self._device,
                batch_size,
                steps=steps,
                cap=self._cap,
                drop=self._snapshot.drop_created,
                ran_before=self._ran,
                confirmation=confirm,
            )
        except Exception as error:
            _name_size(error, batch_size)
            raise
        if not self._first:
            # The trials' own updates drift, so only the first trial says anything about the user's loss.
            probe = dataclasses.replace(probe, notes=tuple(note for note in probe.notes if note != NOT_FINITE))
        self._first, self._ran = False, self._ran or probe.outcome.fits
        return probe

    def close(self) -> None:
        """Put the workload's state back; a second call does nothing."""
        self._stack.close()

    def _read_setting(self, memory_budget: int | float | str | None, margin: float, defaults: Mapping[str, Any]) -> Setting:
        workload, device = self._workload, self._device
        resident = resident_bytes(workload.model, workload.optimizer)
        reading = device.memory()
        reading = dataclasses.replace(reading, held=max(reading.held, resident))
        budget, cap, notes = set_budget(reading, memory_budget, margin)
        return Setting(
            device=device.name,
            device_description=device.description,
            reading=reading,
            budget=budget,
            cap=cap,
            margin=margin,
            resident=resident,
            mode=workload.mode,
            precision=workload.precision,
            has_optimizer=workload.optimizer is not None,
            has_batch_norm=workload.has_batch_norm,
            group_lrs=workload.group_lrs,
            optimizer_name=type(workload.optimizer).__name__ if workload.optimizer else "",
            dataset_size=workload.dataset_size,
            environment=environment() | device.environment(),
            notes=(*reading.notes, *notes, *workload.notes, *device.notes),
            defaults=defaults,
        )


def environment() -> dict[str, str]:
    """Return the versions an answer depends on."""
    return {
        "autobatch": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _name_size(error: Exception, batch_size: int) -> None:
    """Note the batch size on the user's error; Python 3.10 keeps the note but does not print it."""
    note = f"autobatch: this was raised by the training step at batch size {batch_size}; it is not about memory."
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", []), note]  # type: ignore[attr-defined]
