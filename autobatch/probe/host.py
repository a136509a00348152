"""What a data loader's batches take of host memory, beside the one that is trained on: a trial makes only that one."""

from __future__ import annotations

import dataclasses
import math

from autobatch.core.records import Outcome, Peak, Probe
from autobatch.core.units import format_bytes
from autobatch.devices.base import Device
from autobatch.devices.host import host_memory
from autobatch.workload.batches import host_bytes
from autobatch.workload.workload import Workload


class HostMemory:
    """Counts the batches that wait in host memory while a batch of the same size is trained on.

    On the CPU they share the trial's memory: the trial gets that much less, and its peaks are given with them. Beside a card they must fit
    into what is free.
    """

    def __init__(self, workload: Workload, device: Device) -> None:
        self._workload, self._shared = workload, device.is_host
        self._row_bytes: float | None = None

    def waiting(self, batch_size: int) -> int:
        """Return the bytes of the batches of ``batch_size`` rows that wait."""
        if not self._workload.feeding.waiting:
            return 0
        if self._row_bytes is None:
            self._row_bytes = host_bytes(self._workload.make_batch(batch_size)) / batch_size
        return math.ceil(self._row_bytes * batch_size) * self._workload.feeding.waiting

    def refuses(self, batch_size: int, cap: int) -> Probe | None:
        """Return the probe of a size whose batches alone are too large for the host; ``None`` where a trial has to tell."""
        waiting, feeding = self.waiting(batch_size), self._workload.feeding
        if not waiting:
            return None
        needed = waiting + waiting // feeding.waiting
        room = cap if self._shared else host_memory().free
        if needed <= room:
            return None
        message = (
            f"the batches that the data loader keeps in host memory ({feeding}, 1 in use) need {format_bytes(needed)}, "
            f"{'a trial may use' if self._shared else 'free are'} {format_bytes(room)}"
        )
        return Probe(batch_size=batch_size, outcome=Outcome.OOM if self._shared else Outcome.HOST_OOM, message=message)

    def share(self, batch_size: int) -> int:
        """Return the bytes by which a trial's own limit is lower."""
        return self.waiting(batch_size) if self._shared else 0

    def counted(self, probe: Probe) -> Probe:
        """Return ``probe`` with what its trial left to the waiting batches."""
        share = self.share(probe.batch_size)
        if not share:
            return probe
        note = f"the batches that the data loader keeps ready ({self._workload.feeding}) were counted"
        forward_backward, optimizer = _raised(probe.forward_backward, share), _raised(probe.optimizer, share)
        return dataclasses.replace(probe, forward_backward=forward_backward, optimizer=optimizer, notes=(*probe.notes, note))


def _raised(peak: Peak | None, share: int) -> Peak | None:
    return None if peak is None else dataclasses.replace(peak, allocated=peak.allocated + share)
