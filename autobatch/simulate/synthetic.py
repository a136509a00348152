"""A prober without hardware: memory as a formula. For tests of anything that takes a prober, and for what a search costs."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

from autobatch.core.records import MemoryReading, Outcome, Peak, Probe, ProcessMemory, Setting
from autobatch.core.units import MIB
from autobatch.devices.base import narrowed


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticWorkload:
    """A training step whose peak is ``fixed + per_sample · batch_size`` bytes, or the optimizer step's if that is more.

    Attributes:
        capacity: bytes a trial may use.
        fixed: bytes of parameters, gradients and optimizer state.
        per_sample: bytes each row adds to the forward and backward passes.
        bend: rows from which on each costs ``steeper`` times as much: another moment of the step becomes the highest.
        steeper: how much.
        flat: bytes of a moment that no row adds to, which hides the others until they are higher.
        optimizer: peak of the optimizer step as a multiple of ``fixed``, 0 for none.
        rounding: peaks are rounded up to a multiple of this many bytes.
        wobble: every size's peak is off the formula by up to this fraction, always the same for one size and seed.
        seed: which wobble.
        confirmation: what a confirming trial needs, as a multiple of a plain one: fragmentation, caches, later steps.
        step_seconds: seconds every step takes.
        row_seconds: seconds each row adds to it.
        spill: how many times as long a row takes beyond the capacity, with a driver that goes on in host memory; 0 for one that fails.
        neighbours: bytes that others take before the first confirmation, the second, and so on.
        tile: rows that are computed together: a step takes as long as one of the next multiple of it.
    """

    capacity: int
    fixed: int
    per_sample: int
    bend: int = 0
    steeper: float = 1.0
    flat: int = 0
    optimizer: float = 1.2
    rounding: int = 2 * MIB
    wobble: float = 0.0
    seed: int = 0
    confirmation: float = 1.0
    step_seconds: float = 0.0
    row_seconds: float = 0.0
    spill: float = 0.0
    neighbours: tuple[int, ...] = ()
    tile: int = 1

    def peaks(self, batch_size: int) -> tuple[int, int]:
        """Return the bytes at the highest point of forward and backward, and of the optimizer step."""
        off = 1 + self.wobble * self._noise(batch_size)
        more = (self.steeper - 1) * max(0, batch_size - self.bend)
        passes = max(self.flat, self.fixed + self.per_sample * (batch_size + more))
        both = passes * off, self.fixed * self.optimizer * off
        forward_backward, optimizer = (-(-int(peak) // self.rounding) * self.rounding for peak in both)
        return forward_backward, optimizer

    def fits(self, batch_size: int) -> bool:
        """Whether a step of ``batch_size`` rows stays within the capacity."""
        return max(self.peaks(batch_size)) <= self.capacity

    def largest_fit(self) -> int:
        """Return the largest batch size up to which every size fits, 0 when not even one row does."""
        worst = self.capacity / (1 + self.wobble) - self.rounding
        rows = (worst - self.fixed) / self.per_sample
        if rows > self.bend:
            rows = self.bend + (rows - self.bend) / self.steeper
        size = max(0, int(rows)) if max(self.flat, self.fixed * self.optimizer) <= worst else 0
        while self.fits(size + 1):
            size += 1
        return size

    def _noise(self, batch_size: int) -> float:
        digest = hashlib.blake2b(f"{self.seed}:{batch_size}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**63 - 1


class SyntheticProber:
    """Probes a :class:`SyntheticWorkload`; ``readable=False`` gives verdicts without readings."""

    def __init__(self, workload: SyntheticWorkload, *, readable: bool = True) -> None:
        self._workload, self._readable = workload, readable
        self.setting = Setting(
            device="synthetic",
            device_description="a formula",
            reading=MemoryReading(capacity=workload.capacity, free=workload.capacity, source="synthetic"),
            budget=workload.capacity,
            cap=workload.capacity,
            margin=0.0,
            resident=workload.fixed,
            has_optimizer=workload.optimizer > 0,
            spills=workload.spill > 0,
        )
        self._neighbours = list(workload.neighbours)

    def probe(self, batch_size: int, *, steps: int = 3, confirm: bool = False) -> Probe:
        """Return what the formula says of ``batch_size`` rows."""
        work = self._narrowed() if confirm and self._neighbours else self._workload
        trial = dataclasses.replace(work, fixed=int(work.fixed * work.confirmation), per_sample=int(work.per_sample * work.confirmation))
        slower = 1.0 if (trial if confirm else work).fits(batch_size) else work.spill
        if not slower:
            return Probe(batch_size=batch_size, outcome=Outcome.OOM, confirmation=confirm, message="the formula says no")
        forward_backward, optimizer = self._workload.peaks(batch_size)
        return Probe(
            batch_size=batch_size,
            outcome=Outcome.FIT,
            steps=steps,
            forward_backward=Peak(allocated=forward_backward) if self._readable else None,
            optimizer=Peak(allocated=optimizer) if self._readable and self._workload.optimizer > 0 else None,
            seconds_per_step=slower * (work.step_seconds + work.row_seconds * -(-batch_size // work.tile) * work.tile) or None,
            confirmation=confirm,
        )

    def _narrowed(self) -> SyntheticWorkload:
        """Return the workload with the capacity that others have left."""
        taken = self._neighbours.pop(0)
        left, neighbour = self._workload.capacity - taken, ProcessMemory(pid=4121, name="neighbour", used=taken)
        reading = dataclasses.replace(self.setting.reading, free=left, others=(neighbour,))
        self.setting = narrowed(self.setting, reading) or self.setting
        self._workload = dataclasses.replace(self._workload, capacity=self.setting.cap)
        return self._workload

    def close(self) -> None:
        """Do nothing: a formula holds no memory."""
