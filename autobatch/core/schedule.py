"""Warm-up and batch-size ramps, counted in samples: steps change their meaning when the batch grows, samples do not."""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from autobatch.core.errors import InvalidRequest
from autobatch.core.units import divide_up

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_STAGE = re.compile(r"(\d+(?:\.\d+)?)([KMBT]?):(\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stretch of training with one global batch size.

    Attributes:
        start: samples that training has seen when it begins.
        global_batch_size: rows one optimizer step sees.
    """

    start: int
    global_batch_size: int


@dataclass(frozen=True, slots=True)
class Ramp:
    """A global batch size that grows during training.

    Attributes:
        stages: in order; the first begins at 0 samples, each later and larger than the one before.

    Raises:
        InvalidRequest: there is no stage, the first does not begin at 0, or one is not later and larger than the one before.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages or self.stages[0].start != 0:
            first = f"the first begins at {self.stages[0].start:,}" if self.stages else "there is none"
            raise InvalidRequest(f'A ramp\'s first stage begins at 0 samples; {first}. Write for example "0:256 1M:512".')
        if self.stages[0].global_batch_size < 1:
            raise InvalidRequest(f"A ramp begins with a batch of {self.stages[0].global_batch_size}; 1 or more is wanted.")
        for earlier, later in zip(self.stages, self.stages[1:], strict=False):
            if later.start <= earlier.start:
                raise InvalidRequest(
                    f"A stage of the ramp begins at {later.start:,} samples, the one before at {earlier.start:,}: put them in order."
                )
            if later.global_batch_size <= earlier.global_batch_size:
                raise InvalidRequest(
                    f"The ramp goes from {earlier.global_batch_size:,} to {later.global_batch_size:,} rows at {later.start:,} samples; "
                    "it may only grow. A smaller learning rate late in training does what a smaller batch would."
                )

    @classmethod
    def constant(cls, global_batch_size: int) -> Ramp:
        """Return the ramp that stays at ``global_batch_size`` rows."""
        return cls((Stage(start=0, global_batch_size=global_batch_size),))

    @classmethod
    def doubling(cls, start: int, end: int, samples: int) -> Ramp:
        """Return a ramp that doubles from ``start`` rows until it is at ``end``, all stages but the last sharing ``samples`` equally.

        Raises:
            InvalidRequest: a count is below 1, or ``end`` is below ``start``.
        """
        _check_counts(start=start, end=end, samples=samples)
        if end < start:
            raise InvalidRequest(f"The ramp goes from {start:,} down to {end:,} rows; it may only grow.")
        doublings = math.ceil(math.log2(end / start))
        return cls(_equal_stages([min(start * 2**k, end) for k in range(doublings + 1)], samples))

    @classmethod
    def steps(cls, start: int, increment: int, samples: int, end: int) -> Ramp:
        """Return a ramp from ``start`` to ``end`` rows by ``increment`` rows at a time, reached after ``samples`` samples.

        The form of Megatron-LM's ``--rampup-batch-size start increment samples``.

        Raises:
            InvalidRequest: a count is below 1, ``end`` is below ``start``, or increments do not add up to it.
        """
        _check_counts(start=start, increment=increment, samples=samples, end=end)
        if end < start:
            raise InvalidRequest(f"The ramp goes from {start:,} down to {end:,} rows; it may only grow.")
        if (end - start) % increment:
            down = end - (end - start) % increment
            raise InvalidRequest(
                f"From {start:,} rows, increments of {increment:,} do not add up to {end:,}: "
                f"the nearest are {down:,} and {down + increment:,}."
            )
        return cls(_equal_stages(range(start, end + 1, increment), samples))

    @classmethod
    def parse(cls, text: str, tokens_per_sample: int = 1) -> Ramp:
        """Return the ramp that ``text`` describes, ``"0:768 250B:1536"``: where a stage begins, and its global batch size.

        Thresholds may end in K, M, B or T (10³ to 10¹²), and are samples; or tokens, where ``tokens_per_sample`` says how many make one.

        Raises:
            InvalidRequest: the text is no ramp.
        """
        _check_counts(tokens_per_sample=tokens_per_sample)
        stages = []
        for part in text.split():
            match = _STAGE.fullmatch(part)
            if match is None:
                raise InvalidRequest(f'{part!r} is no stage of a ramp. Write where it begins and its batch, for example "0:768 250B:1536".')
            # A threshold such as 1.1M is a whole number of samples, which its binary fraction is not.
            threshold = round(float(match[1]) * _SUFFIXES[match[2].upper()])
            stages.append(Stage(start=divide_up(threshold, tokens_per_sample), global_batch_size=int(match[3])))
        return cls(tuple(stages))

    def at(self, samples: int) -> Stage:
        """Return the stage that training is in after ``samples`` samples."""
        return self.stages[bisect.bisect_right(self.stages, samples, key=lambda stage: stage.start) - 1]

    def updates(self, samples: int) -> int:
        """Return the optimizer steps that ``samples`` samples make, data sets and their ends left aside."""
        seen = count = 0
        while seen < samples:
            stage = self.at(seen)
            following = min((s.start for s in self.stages if s.start > seen), default=samples)
            steps = divide_up(min(following, samples) - seen, stage.global_batch_size)
            seen, count = seen + steps * stage.global_batch_size, count + steps
        return count

    def check_multiple(self, rows: int) -> None:
        """Check that every stage is a multiple of ``rows``: what all devices together run at once.

        Raises:
            InvalidRequest: one is not; the message names the nearest that are.
        """
        for stage in self.stages:
            size = stage.global_batch_size
            if size % rows:
                near = [multiple for multiple in (size // rows * rows, divide_up(size, rows) * rows) if multiple]
                raise InvalidRequest(
                    f"The ramp's batch of {size:,} rows is no multiple of the {rows:,} rows that all devices run at once: "
                    f"the nearest are {' and '.join(f'{multiple:,}' for multiple in near)}. For smaller steps, plan with a smaller "
                    "max_batch_size."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The batches between two optimizer steps.

    Attributes:
        first: index in the epoch of its first batch, per device.
        batches: batches per device that make it up: the gradient accumulation steps, fewer at the end of an epoch.
        global_batch_size: rows its stage has in a step.
        samples: samples that training has seen when it begins.
        lr_scale: learning rate of its stage as a multiple of the plan's.
    """

    first: int
    batches: int
    global_batch_size: int
    samples: int
    lr_scale: float

    @property
    def last(self) -> int:
        """Index in the epoch of its last batch: after it comes the optimizer step."""
        return self.first + self.batches - 1


def windows(ramp: Ramp, *, batches: int, rows: int, seen: int, lr_scale: Callable[[int], float]) -> Iterator[Window]:
    """Yield the windows of an epoch of ``batches`` batches, ``rows`` rows on all devices together, after ``seen`` samples of training."""
    first = 0
    while first < batches:
        samples = seen + first * rows
        size = ramp.at(samples).global_batch_size
        count = min(size // rows, batches - first)
        yield Window(first=first, batches=count, global_batch_size=size, samples=samples, lr_scale=lr_scale(size))
        first += count


def warmup_steps(samples: int, global_batch_size: int) -> int:
    """Return the optimizer steps in which ``samples`` samples are seen.

    Raises:
        InvalidRequest: there are fewer than 0.
    """
    if samples < 0:
        raise InvalidRequest(f"A warm-up of {samples:,} samples is shorter than none. Give 0 or more.")
    return divide_up(samples, global_batch_size)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InvalidRequest(f"{name} is {count!r}; a whole number of 1 or more is wanted.")


def _equal_stages(sizes: Sequence[int], samples: int) -> tuple[Stage, ...]:
    """Return a stage for each of ``sizes``, the last beginning at ``samples``."""
    length = len(sizes) - 1
    return tuple(Stage(start=divide_up(k * samples, length) if k else 0, global_batch_size=size) for k, size in enumerate(sizes))
