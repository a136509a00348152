"""The memory model: peak(b) = max of two lines, one for the forward and backward passes and one for the optimizer step.

It is fitted on *allocated* bytes, each phase on its own: their maximum has a kink, each phase has none; reserved bytes jump with
fragmentation, allocated bytes do not. It only ever advises the search. Readings wobble, because kernels choose other algorithms at other
sizes and allocators round, so every figure is handled as an interval: a jump goes to a size that fits even when the readings wobbled
against it, and a predicted wall counts only after a probe close to it came out as predicted.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autobatch.core.records import Probe
from autobatch.core.units import MIB

# No batch is larger.
LAST = 2**20
# Relative wobble that is expected of readings, the worst that a jump must survive, and the absolute steps that allocators round to: a
# card's, and a finer share of less memory than any card has.
WOBBLE = 0.0025
WORST_WOBBLE = 0.03
ROUNDING, FINER = 2 * MIB, 2048
# From this growth of the peak on, the worst wobble can no longer be taken for a slope.
RESOLVED = 1.5
# A prediction counts as confirmed by a probe this close to the wall that came out this close to what was predicted.
NEAR_WALL = 0.05
CONFIRMED = 0.01
# A line goes through the largest size and one of at most this share of it, so that wobble does not tilt it; where the largest was missed by
# more than any wobble, through one as near as wobble allows.
FAR, NEAR = 0.5, 0.9
# How far below a wall the next size is taken, and how much of the way back where the wall was a long way from what was measured: over a
# long way another moment of the step becomes the highest, whose rows cost more.
STEP, WAY_BACK = 0.02, 0.125
# Where a search begins that expects something: at a size expected to need this share of the limit. Less than half, so that it fits also
# where twice as much is needed, and the step from there to the wall doubles the best.
START = 0.46
# How much of the way from there to the predicted wall the second probe goes.
CLOSE = 0.99


@dataclass(frozen=True, slots=True)
class Line:
    """Peak bytes of one phase: ``base + per_sample · batch_size``, through two measured sizes."""

    base: float
    per_sample: float

    def at(self, batch_size: int) -> float:
        """Return the bytes at ``batch_size``."""
        return self.base + self.per_sample * batch_size

    def reaches(self, limit: float) -> float:
        """Return the batch size at which the line reaches ``limit`` bytes, infinite for a line that never does."""
        if self.per_sample > 0:
            return (limit - self.base) / self.per_sample
        return float("inf") if self.base <= limit else 0.0


class MemoryModel:
    """Predicts peaks from the probes it has observed, and advises a search under ``cap`` bytes.

    Args:
        cap: bytes a trial may use.
        expected: bytes that a step of so many rows is expected to need, from a simulation, say. The first probe calibrates it; where that
            one does not fit, it is forgotten.

    Attributes:
        cap: bytes a trial may use.
        residual: largest relative error with which a probe was predicted from those before it, ``None`` before there was one.
    """

    def __init__(self, cap: int, expected: Callable[[int], float] | None = None) -> None:
        self.cap = cap
        self._expected = expected
        self.residual: float | None = None
        self._forward_backward: dict[int, int] = {}
        self._optimizer: dict[int, int] = {}
        self._surprise: dict[int, float] = {}
        self._failures = 0  # since a size fitted

    def observe(self, probe: Probe) -> None:
        """Take in a probe; one that did not fit broke off before its peak and says nothing, one without readings neither."""
        if not probe.outcome.fits and not self._forward_backward:
            self._expected = None  # it was to fit easily
        self._failures = 0 if probe.outcome.fits else self._failures + 1
        if not probe.outcome.fits or probe.forward_backward is None:
            return
        size, peak = probe.batch_size, probe.peak_allocated
        predicted = self.predict(size)
        if predicted is not None and peak:
            self._surprise[size] = abs(predicted - peak) / peak
            self.residual = max(self._surprise.values())
        self._forward_backward[size] = probe.forward_backward.allocated
        if probe.optimizer is not None:
            self._optimizer[size] = probe.optimizer.allocated

    def predict(self, batch_size: int) -> int | None:
        """Return the bytes a step of ``batch_size`` rows needs at its highest, ``None`` before two sizes were measured."""
        lines = self._lines()
        return round(max(line.at(batch_size) for line in lines)) if lines else None

    def largest(self, limit: int) -> int | None:
        """Return the largest batch size predicted to need at most ``limit`` bytes, ``None`` when no size is predicted to be the last."""
        size = min((line.reaches(limit) for line in self._lines()), default=float("inf"))
        # The line passes through what was measured, give or take the last bit of a float.
        return None if size == float("inf") else max(0, int(size + 1e-6))

    def start(self, last: int) -> int | None:
        """Return the batch size to begin with, at most ``last``: near the expected wall, ``None`` where nothing is expected."""
        return None if self._expected is None else _reaches(self._expected, START * self.cap, last) or None

    def suggest(self, best: int, wall: int | None) -> int | None:
        """Return the batch size to try next: as far up as must fit, then where the wall is predicted, ``None`` for no advice."""
        if best not in self._forward_backward:
            return None
        limit = self.largest(self.cap)
        if wall is None and limit is not None and best < limit and len(self._forward_backward) == 1 and self._expected is not None:
            return best + max(1, int(CLOSE * (limit - best)))
        safe = self._safe(best)
        if self._has_turned(best, limit) and best * (1 + WOBBLE) < safe < (wall or safe + 1):
            return safe
        if wall is not None and (limit or safe) >= wall * (1 - NEAR_WALL):
            return self._below(wall, best, limit)
        if limit is None or best < limit * (1 - NEAR_WALL):
            if safe >= 2 * best or limit is None or safe >= limit * (1 - CONFIRMED):
                return safe if safe > best else None
            return limit  # a short hop would earn nothing
        if self._missed(best):
            return round(max(limit, best) * (1 + CONFIRMED / 2))  # the model is off: find out from above
        return safe if safe > best * (1 + WOBBLE) else limit + 1

    def confirmed_limit(self, best: int) -> int | None:
        """Return the largest batch size that can fit, ``None`` unless ``best`` is within 5 % of it and came out as predicted to 1 %."""
        surprise = self._surprise.get(best)
        limit = self.largest(self.cap)
        if surprise is None or limit is None or surprise > CONFIRMED or best < limit * (1 - NEAR_WALL):
            return None
        # From the probe up, only the slope and this probe's own wobble are left to be wrong.
        slope = self._slope(best, WOBBLE)[0]
        return None if slope <= 0 else best + int(max(0.0, self.cap - self._peak(best)) / slope)

    def _safe(self, best: int) -> int:
        """Return the largest size that fits even when every reading wobbled the wrong way."""
        room = self.cap * (1 - WOBBLE) - self._peak(best) * (1 + WOBBLE)
        if len(self._forward_backward) < 2:
            # One size is known: with a base of nothing at all, every row would cost its full share.
            return int(best * self.cap * (1 - WOBBLE) / (self._peak(best) * (1 + WOBBLE)))
        slope = self._slope(best, self._wobble(best))[1]
        if self._missed(best):
            # No line after all: from here on rows may cost what they cost on the last stretch, though fewer bytes before it.
            below = max((size for size in self._forward_backward if size < best), default=0)
            slope = max(slope, (self._forward_backward[best] - self._forward_backward.get(below, 0)) / (best - below))
        return best + int(max(0.0, room) / slope)

    def _has_turned(self, best: int, limit: int | None) -> bool:
        """Whether ``best``, close to the wall, is not what was predicted: what the rows cost from here on is known better only now."""
        return self._missed(best) and limit is not None and best >= limit * (1 - NEAR_WALL)

    def _missed(self, size: int, by: float = CONFIRMED) -> bool:
        """Whether ``size`` came out otherwise than the probes before it predicted, by more than a share of its peak."""
        return self._surprise.get(size, 0.0) > by

    def _below(self, wall: int, best: int, limit: int | None) -> int | None:
        """Return a size under ``wall`` that is likely to fit and close to it, inside the bracket far enough for either verdict to count."""
        if self._failures > 1 and wall > 2 * best and (limit is None or limit >= wall):
            return int(math.sqrt(best * wall))  # too large by an unknown factor, not by a part: a steeper phase was hidden under a flat one
        close = int(wall - max(STEP * wall, WAY_BACK * (wall - best)))
        if best < close:
            return close if limit is None or limit >= close else max(limit, best + (wall - best) // 8)
        if limit is None or not best < limit < wall or (self.residual or 0.0) > CONFIRMED:
            return None  # plain bisection: the model has been off by more than the bracket is wide
        return min(max(limit, best + (wall - best) // 8), wall - (wall - best) // 8)

    def _wobble(self, top: int) -> float:
        """Return the wobble to allow for: the worst while the peak has hardly grown, since all of the growth might be wobble."""
        grown = self._forward_backward[top] >= RESOLVED * min(self._forward_backward.values())
        return WOBBLE if grown else WORST_WOBBLE

    def _slope(self, top: int, wobble: float) -> tuple[float, float]:
        """Return the least and the largest bytes a row that the readings up to ``top`` allow."""
        high = self._forward_backward[top]
        low_bounds, high_bounds = [0.0], []
        for size, peak in self._forward_backward.items():
            if size < top:
                slack = wobble * (high + peak) + (min(ROUNDING, self.cap / FINER) if wobble == WOBBLE else ROUNDING)
                low_bounds.append((high - peak - slack) / (top - size))
                high_bounds.append((high - peak + slack) / (top - size))
        return max(low_bounds), max(1.0, min(high_bounds, default=float("inf")))

    def _peak(self, size: int) -> int:
        return max(self._forward_backward[size], self._optimizer.get(size, 0))

    def _lines(self) -> list[Line]:
        if len(self._forward_backward) == 1 and self._expected is not None:
            return self._calibrated(self._expected)
        top = max(self._forward_backward, default=0)
        reach = NEAR if self._missed(top, by=WORST_WOBBLE) else FAR
        return [line for points in (self._forward_backward, self._optimizer) if (line := _through(points, reach)) is not None]

    def _calibrated(self, expected: Callable[[int], float]) -> list[Line]:
        """Return the line from the one measured size to the wall that is expected once it is scaled to what was measured."""
        ((size, measured),) = self._forward_backward.items()
        scale = self._peak(size) / max(1.0, expected(size))
        wall = max(size + 1, _reaches(expected, self.cap / scale, LAST))
        slope = (scale * expected(wall) - measured) / (wall - size)
        return [Line(base=measured - slope * size, per_sample=slope)] if slope > 0 else []


def through_points(points: Sequence[tuple[int, int]]) -> Callable[[int], float] | None:
    """Return bytes by batch size along straight lines between ``points`` and on beyond the last, ``None`` for fewer than two."""
    if len(points) < 2:
        return None
    sizes = [size for size, _ in points]

    def at(size: int) -> float:
        right = min(max(bisect_left(sizes, size), 1), len(points) - 1)
        (start, low), (end, high) = points[right - 1], points[right]
        return low + (high - low) * (size - start) / (end - start)

    return at


def _reaches(expected: Callable[[int], float], limit: float, last: int) -> int:
    """Return the largest size up to ``last`` that is expected to need at most ``limit`` bytes."""
    fits, fails = 0, last + 1
    while fails - fits > 1:
        middle = min((fits + fails) // 2, max(1, 4 * fits))  # from below: small sizes are cheap to think about
        fits, fails = (middle, fails) if expected(middle) <= limit else (fits, middle)
    return fits


def _through(points: dict[int, int], reach: float) -> Line | None:
    """Return the line through the largest size and the next that is at most ``reach`` of it, else the smallest."""
    if len(points) < 2:
        return None
    sizes = sorted(points)
    top = sizes[-1]
    below = max((size for size in sizes[:-1] if size <= reach * top), default=sizes[0])
    slope = max(0.0, (points[top] - points[below]) / (top - below))
    return Line(base=points[top] - slope * top, per_sample=slope)
