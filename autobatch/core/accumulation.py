"""How a global batch is shared out over devices and gradient accumulation steps."""

from __future__ import annotations

from dataclasses import dataclass

from autobatch.core.errors import InvalidRequest
from autobatch.core.units import divide_up


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """How a global batch is shared out in equal parts.

    Attributes:
        batch_size: rows in each micro-batch, per device.
        accumulation_steps: micro-batches per device in one optimizer step.
        global_batch_size: rows that one optimizer step sees in effect.
        deviation: rows by which that differs from what was asked for.
    """

    batch_size: int
    accumulation_steps: int
    global_batch_size: int
    deviation: int


def micro_batch(global_batch_size: int, world_size: int, largest: int, multiple_of: int = 1, smallest: int = 1) -> MicroBatch:
    """Return the fewest equal micro-batches that make up ``global_batch_size`` rows over ``world_size`` devices.

    Equal parts are rounded up to ``multiple_of``, so the effective global batch may be larger than asked for, never smaller.

    Raises:
        InvalidRequest: no multiple of ``multiple_of`` lies between ``smallest`` and ``largest``.
    """
    first, last = _round_up(smallest, multiple_of), largest // multiple_of * multiple_of
    if first > last:
        raise InvalidRequest(
            f"No multiple of {multiple_of} lies between batch sizes {smallest} and {largest}: "
            f"a global batch of {global_batch_size} cannot be shared out. Lower multiple_of or min_batch_size."
        )
    steps = divide_up(global_batch_size, world_size * last)
    size = max(first, _round_up(divide_up(global_batch_size, world_size * steps), multiple_of))
    effective = size * world_size * steps
    return MicroBatch(batch_size=size, accumulation_steps=steps, global_batch_size=effective, deviation=effective - global_batch_size)


def _round_up(size: int, multiple_of: int) -> int:
    return divide_up(size, multiple_of) * multiple_of
