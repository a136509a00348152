"""What a training step needs on a simulated card, as formulas: 300 drawn cases and the special ones, always the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from autobatch.core.units import GIB, MIB
from benchmarks.search_cost import workloads

DRAWN = 300
# Training steps that an answer has to last.
STEPS = 200
# From this step on, the growth of a case is there.
GROWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A training step whose memory is a formula; amounts in bytes.

    Attributes:
        name: what it is called in the results.
        kind: ``"drawn"``, or what is special about it.
        capacity: what the card has for tensors.
        base: parameters and gradients.
        state: optimizer state, resident from the end of the first step on.
        per_sample: what each row adds to the forward and backward passes.
        optimizer: highest point of the optimizer's step.
        growth: what comes on top from the third step of a training run on.
        band: sizes, first and last, that need another algorithm, with a workspace larger than the card; ``None`` for none.
        dataset: rows there are to make a batch of, ``None`` for as many as are wanted.
        rounding: every peak is rounded up to a multiple of this.
    """

    name: str
    kind: str = "drawn"
    capacity: int
    base: int
    state: int
    per_sample: int
    optimizer: int
    growth: int = 0
    band: tuple[int, int] | None = None
    dataset: int | None = None
    rounding: int = 2 * MIB

    def rows(self, batch_size: int) -> int:
        """Return the rows a batch of ``batch_size`` really has."""
        return batch_size if self.dataset is None else min(batch_size, self.dataset)

    def pass_peak(self, rows: int, step: int, with_state: bool) -> int:
        """Return the highest point of the forward and backward passes in the ``step``-th step, counted from 1."""
        peak = self.base + self.per_sample * rows + (self.state if with_state else 0) + (self.growth if step >= GROWN else 0)
        if self.band is not None and self.band[0] <= rows <= self.band[1]:
            peak += self.capacity
        return -(-peak // self.rounding) * self.rounding

    def step_peak(self) -> int:
        """Return the highest point of the optimizer's step."""
        return -(-max(self.optimizer, self.base + self.state) // self.rounding) * self.rounding

    def lasts(self, batch_size: int, steps: int = STEPS) -> bool:
        """Whether ``steps`` training steps of ``batch_size`` rows run through; from the one in which it grows on, all are alike."""
        rows = self.rows(batch_size)
        passes = (self.pass_peak(rows, step, step > 1) for step in range(1, min(steps, GROWN) + 1))
        return batch_size >= 1 and self.step_peak() <= self.capacity and all(peak <= self.capacity for peak in passes)

    def truth(self) -> tuple[int, int]:
        """Return the largest size below the first that fails, and the largest of all that lasts, by looking at every size.

        The two differ only where a band of sizes fails and larger ones do not.
        """
        bound = self.capacity // self.per_sample + 1
        rows = np.arange(1, (min(bound, self.dataset) if self.dataset is not None else bound) + 1, dtype=np.int64)
        peak = self.base + self.state + self.growth + self.per_sample * rows
        if self.band is not None:
            peak += np.where((rows >= self.band[0]) & (rows <= self.band[1]), self.capacity, 0)
        fits = (-(-peak // self.rounding) * self.rounding <= self.capacity) & (self.step_peak() <= self.capacity)
        first_failing = int(np.argmin(fits)) if not fits.all() else len(fits)
        return first_failing, int(rows[fits][-1]) if fits.any() else 0


def drawn(count: int = DRAWN) -> Iterator[Case]:
    """Yield the cases of ``benchmarks.search_cost``; half of what is fixed is optimizer state, as AdamW's in fp32."""
    for number, work in enumerate(workloads(count)):
        yield Case(
            name=f"drawn-{number}",
            capacity=work.capacity,
            base=work.fixed - work.fixed // 2,
            state=work.fixed // 2,
            per_sample=work.per_sample,
            optimizer=int(work.fixed * work.optimizer),
        )


def special() -> list[Case]:
    """Return the cases that finders are known to trip over, two of a kind."""
    plain = Case(name="", capacity=24 * GIB, base=2 * GIB, state=2 * GIB, per_sample=20 * MIB, optimizer=5 * GIB)
    room = plain.capacity - plain.base - plain.state

    def fitting(largest: int) -> int:
        return room // largest // MIB * MIB if room // largest >= 2 * MIB else room // largest

    return [
        replace(plain, name="nothing-activations", kind="nothing fits", per_sample=room + MIB),
        replace(plain, name="nothing-optimizer", kind="nothing fits", optimizer=plain.capacity + MIB),
        replace(plain, name="one-large-rows", kind="one row only", per_sample=int(room * 0.7)),
        replace(plain, name="one-just", kind="one row only", per_sample=room),
        replace(plain, name="power-64", kind="power of two", per_sample=fitting(64)),
        replace(plain, name="power-1024", kind="power of two", per_sample=room // 1024),
        replace(plain, name="beyond-20000", kind="beyond 8192", per_sample=room // 20_000),
        replace(plain, name="beyond-300000", kind="beyond 8192", per_sample=room // 300_000),
        replace(plain, name="dataset-1000", kind="beyond the data set", per_sample=room // 50_000, dataset=1000),
        replace(plain, name="dataset-4096", kind="beyond the data set", per_sample=room // 9000, dataset=4096),
        replace(plain, name="state-large", kind="optimizer state dominant", base=2 * GIB, state=18 * GIB, optimizer=21 * GIB),
        replace(plain, name="state-tight", kind="optimizer state dominant", base=GIB, state=20 * GIB, optimizer=plain.capacity),
        replace(plain, name="band-low", kind="non-monotone band", per_sample=room // 1000, band=(300, 340)),
        replace(plain, name="band-high", kind="non-monotone band", per_sample=room // 1000, band=(700, 710)),
        replace(plain, name="growth-small", kind="grows in the third step", growth=GIB),
        replace(plain, name="growth-large", kind="grows in the third step", growth=8 * GIB, per_sample=5 * MIB),
    ]


def cases(count: int = DRAWN) -> list[Case]:
    """Return ``count`` drawn cases and all the special ones."""
    return [*drawn(count), *special()]
