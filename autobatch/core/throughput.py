"""How long a step takes by its batch size, t(B) = a + b·B, and the size from which on more rows hardly make it faster.

Rows a second, B / (a + b·B), rise towards 1 / b; at B = a / b they are half of that. The line is only ever a guide: which size is fast
enough is decided among sizes that were timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from autobatch.core.records import Probe, SearchSpace

# A line that is off by more than this at a measured size is not believed.
HOLDS = 0.05
# Where the line is not believed, sizes are tried at which kernels fill whole tiles of the device: multiples of these.
TILES = (64, 8)
# The answer is settled when it is this close to a size that is too slow, or to the predicted one.
CLOSE = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """The line through the step times of a search: ``seconds_per_batch + seconds_per_sample · batch size``.

    Attributes:
        seconds_per_batch: what a step takes whatever its size.
        seconds_per_sample: what each row adds to it.
        residual: largest relative error at a measured size; ``None`` for two sizes, through which there always is a line.
        fastest: measured batch size with the most samples per second.
        fraction: share of the fastest's samples per second that is fast enough.
    """

    seconds_per_batch: float
    seconds_per_sample: float
    residual: float | None = None
    fastest: int
    fraction: float

    @property
    def holds(self) -> bool:
        """Whether the line is within 5 % of every step time, of three sizes or more."""
        return self.residual is not None and self.residual <= HOLDS

    @property
    def knee(self) -> int:
        """The smallest batch size that the line predicts to be fast enough, at least 1; a guide where the line does not hold."""
        size = knee_size(self.seconds_per_batch, self.seconds_per_sample, self.fraction, self.fastest)
        return max(1, math.ceil(size * (1 - 1e-9)))


def knee_size(seconds_per_batch: float, seconds_per_sample: float, fraction: float, largest: int | None = None) -> float:
    """Return the smallest batch size at ``fraction`` of the samples per second of ``largest``, else of an endless batch.

    With t(B) = a + b·B that is f/(1−f)·a/b, and f·a·Bm / (a + (1−f)·b·Bm) against the largest batch Bm; infinite for b = 0 without one.
    """
    if largest is not None:
        return fraction * seconds_per_batch * largest / (seconds_per_batch + (1 - fraction) * seconds_per_sample * largest)
    if seconds_per_sample == 0:
        return math.inf
    return fraction / (1 - fraction) * seconds_per_batch / seconds_per_sample


def step_times(probes: Iterable[Probe], largest: int | None = None) -> dict[int, float]:
    """Return seconds a step by batch size, of the sizes up to ``largest`` that fit.

    Of several trials of a size the fastest counts: a busy machine makes a step slower, nothing makes it faster.
    """
    seconds: dict[int, float] = {}
    for probe in probes:
        if probe.outcome.fits and probe.seconds_per_step and (largest is None or probe.batch_size <= largest):
            seconds[probe.batch_size] = min(probe.seconds_per_step, seconds.get(probe.batch_size, math.inf))
    return seconds


def fit_throughput(seconds: Mapping[int, float], fraction: float) -> Throughput | None:
    """Return the line through ``seconds`` a step by batch size, ``None`` for fewer than two sizes.

    Least squares of the relative errors (weights 1/t²), with a ≥ 0 and b ≥ 0: a step of no rows takes no time at the least.
    """
    if len(seconds) < 2:
        return None
    points = [(1 / t, size / t) for size, t in seconds.items()]
    xx, xy, yy = (sum(x * x for x, _ in points), sum(x * y for x, y in points), sum(y * y for _, y in points))
    x, y = sum(x for x, _ in points), sum(y for _, y in points)
    determinant = xx * yy - xy * xy
    a, b = (x * yy - y * xy) / determinant, (y * xx - x * xy) / determinant
    if a < 0:
        a, b = 0.0, y / yy
    elif b < 0:
        a, b = x / xx, 0.0
    residual = max(abs(a + b * size - t) / t for size, t in seconds.items())
    return Throughput(
        seconds_per_batch=a,
        seconds_per_sample=b,
        residual=residual if len(seconds) > 2 else None,
        fastest=max(seconds, key=lambda size: size / seconds[size]),
        fraction=fraction,
    )


def fast_enough(seconds: Mapping[int, float], fraction: float) -> int | None:
    """Return the smallest timed size at ``fraction`` or more of the best samples per second, ``None`` when none was timed."""
    rates = {size: size / t for size, t in seconds.items()}
    return min((size for size, rate in rates.items() if rate >= fraction * max(rates.values()) * (1 - 1e-9)), default=None)


def next_to_time(seconds: Mapping[int, float], space: SearchSpace, best: int, fraction: float) -> int | None:
    """Return the size to time next to learn which is the smallest that is fast enough, ``None`` once that is settled.

    The predicted knee is tried first, then what lies between the largest size that is too slow and the smallest that is not. Where the
    times are on no line, because kernels work in whole tiles or the allocator had to retry, those sizes are multiples of 64 and of 8.

    Args:
        seconds: seconds a step by batch size, of sizes that fit.
        space: the permitted sizes.
        best: the largest size that fits.
        fraction: share of the best samples per second that is fast enough.
    """
    chosen = fast_enough(seconds, fraction)
    if chosen is None:
        return None
    line = fit_throughput(seconds, fraction)
    refused = line is not None and line.residual is not None and not line.holds
    multiples = [math.lcm(space.multiple_of, tile) for tile in TILES] if refused else [space.multiple_of]
    if refused:
        full = [best // multiple * multiple for multiple in multiples]
        untimed = [size for size in full if size >= space.first and size not in seconds]
        if untimed:
            return untimed[0]
    for multiple in multiples:
        slow = max((size for size in seconds if size < chosen and size % multiple == 0), default=space.first - space.multiple_of)
        middle = math.sqrt(max(slow, 1) * chosen)
        if line is not None and not refused:
            if line.knee * CLOSE >= chosen:
                return None
            middle = line.knee if line.knee > slow else middle
        size = _between(slow, chosen, middle, multiple)
        if size is not None and chosen > CLOSE * slow:
            return size
    return None


def _between(slow: int, chosen: int, middle: float, multiple: int) -> int | None:
    """Return the multiple next to ``middle`` from above, else from below, that lies between the two sizes."""
    above = math.ceil(middle / multiple) * multiple
    return next((size for size in (above, above - multiple) if slow < size < chosen), None)
