"""A step at any batch size from two traces of it: every storage's size is ``fixed + per_sample · batch_size``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from autobatch.simulate.allocator import CachingAllocator, SimulatedOutOfMemory
from autobatch.simulate.allocator_settings import AllocatorSettings
from autobatch.simulate.blocks import Block
from autobatch.simulate.recorder import BUFFER, GRADIENT, PARAMETER, STATE, TEMPORARY, Trace

# The grain of the smallest capacity: what segments are rounded to.
_GRAIN = 2 * 2**20
# What rules for temporaries may be off a straight line by rounding: less than the least block.
_ROUNDING = 512
_RESIDENT = (PARAMETER, BUFFER, STATE, GRADIENT)


class NotAffine(Exception):
    """The step does something else at another batch size: other operators, or sizes that no line goes through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineTrace:
    """A step whose storages grow with the batch in straight lines.

    Attributes:
        fixed: bytes of each storage that do not depend on the batch.
        per_sample: bytes of each storage that each row adds.
        events: births and deaths, as in a trace.
        of: the trace it was made from, for what each storage is.
    """

    fixed: tuple[int, ...]
    per_sample: tuple[float, ...]
    events: tuple[int, ...]
    of: Trace

    @classmethod
    def through(cls, small: Trace, large: Trace, check: Trace) -> AffineTrace:
        """Return the lines through two traces, held against a third, which may be one of fewer iterations.

        Raises:
            NotAffine: they differ in more than sizes, or the third lies beside the lines.
        """
        if small.events != large.events or small.events[: len(check.events)] != check.events:
            raise NotAffine("the step runs other operators at other batch sizes")
        rows = large.batch_size - small.batch_size
        fixed, per_sample = [], []
        for before, after, third in itertools.zip_longest(small.storages, large.storages, check.storages):
            slope, rest = divmod(after.size - before.size, rows)
            base = before.size - slope * small.batch_size
            slack = _ROUNDING if after.tag == TEMPORARY else 0
            if rest > slack or (third is not None and abs(base + slope * check.batch_size - third.size) > slack):
                raise NotAffine(
                    f"the {after.tag} that {after.operator} makes in {after.module or 'the step'} does not grow in a straight line"
                )
            fixed.append(base)
            per_sample.append(slope)
        return cls(fixed=tuple(fixed), per_sample=tuple(per_sample), events=tuple(large.events), of=large)

    @classmethod
    def nearly(cls, small: Trace, large: Trace) -> AffineTrace:
        """Return the lines through two traces of a step that differs a little from batch to batch.

        Where not even the order of its storages is the same, every storage of the larger trace that is not resident is taken to grow
        with the batch.
        """
        fixed: list[int] = []
        per_sample: list[float] = []
        alike = small.events == large.events
        for index, after in enumerate(large.storages):
            if alike:
                slope = max(0.0, (after.size - small.storages[index].size) / (large.batch_size - small.batch_size))
            else:
                slope = 0.0 if after.tag in _RESIDENT else after.size / large.batch_size
            fixed.append(max(0, round(after.size - slope * large.batch_size)))
            per_sample.append(slope)
        return cls(fixed=tuple(fixed), per_sample=tuple(per_sample), events=tuple(large.events), of=large)

    def sizes(self, batch_size: int) -> list[int]:
        """Return every storage's bytes for ``batch_size`` rows."""
        return [int(base + slope * batch_size) for base, slope in zip(self.fixed, self.per_sample, strict=True)]

    def peak(self, batch_size: int) -> int:
        """Return the bytes asked for at the highest point."""
        sizes, now, highest = self.sizes(batch_size), 0, 0
        for event in self.events:
            now += sizes[event] if event >= 0 else -sizes[~event]
            highest = max(highest, now)
        return highest


def points_of(trace: AffineTrace) -> tuple[tuple[int, int], ...]:
    """Return the peak at every power of two up to 2^20 rows as (batch size, bytes): between them it is as good as straight."""
    return tuple((2**power, trace.peak(2**power)) for power in range(21))


def replay(events: Sequence[int], sizes: Sequence[int], card: CachingAllocator) -> CachingAllocator:
    """Return ``card`` after the events, for its figures; storages of no bytes take none.

    Raises:
        SimulatedOutOfMemory: the card has no room.
    """
    live: dict[int, Block] = {}
    for event in events:
        if event >= 0:
            if sizes[event]:
                live[event] = card.malloc(sizes[event])
        elif sizes[~event]:
            card.free(live.pop(~event))
    return card


def smallest_capacity(events: Sequence[int], sizes: Sequence[int], settings: AllocatorSettings | None = None) -> int:
    """Return the least bytes of a card on which the step completes, to 2 MiB: below what it would reserve on a larger one."""
    free = replay(events, sizes, CachingAllocator(settings=settings))
    low, high = free.peak_allocated // _GRAIN, -(-free.peak_reserved // _GRAIN)
    while low < high:
        middle = (low + high) // 2
        if completes(events, sizes, middle * _GRAIN, settings):
            high = middle
        else:
            low = middle + 1
    return high * _GRAIN


def completes(events: Sequence[int], sizes: Sequence[int], capacity: int, settings: AllocatorSettings | None = None) -> bool:
    """Whether the step runs through on a card that offers ``capacity`` bytes."""
    try:
        replay(events, sizes, CachingAllocator(capacity, settings))
    except SimulatedOutOfMemory:
        return False
    return True
