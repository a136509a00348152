"""How many batches and optimizer steps an epoch has, as ``DataLoader`` and ``DistributedSampler`` really share a data set out."""

from __future__ import annotations

from dataclasses import dataclass

from autobatch.core.errors import InvalidRequest
from autobatch.core.units import divide_up


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One pass over a data set, as each of ``world_size`` devices sees it.

    Attributes:
        rows: rows of a device's share.
        iterations: batches a device runs.
        updates: optimizer steps; a last, partial window of accumulation steps counts as one.
        last_batch_size: rows in the last batch, 0 when there is none.
        repeated: rows drawn twice so that the shares are equal, over all devices.
        left_out: rows never drawn, over all devices.
    """

    rows: int
    iterations: int
    updates: int
    last_batch_size: int
    repeated: int = 0
    left_out: int = 0


def share(rows: int, world_size: int, drop_last: bool = False) -> int:
    """Return the rows that ``DistributedSampler`` gives each of ``world_size`` devices: alike, by repeating or leaving out some."""
    return rows // world_size if drop_last else divide_up(rows, world_size)


def epoch(
    rows: int,
    batch_size: int,
    *,
    world_size: int = 1,
    accumulation_steps: int = 1,
    drop_last: bool = False,
    sampler_drop_last: bool | None = None,
) -> Epoch:
    """Return what an epoch over ``rows`` rows is, in batches of ``batch_size`` rows a device.

    Args:
        rows: rows in the data set.
        batch_size: rows in a batch, per device.
        world_size: devices that share the data set.
        accumulation_steps: batches per device in one optimizer step.
        drop_last: ``drop_last`` of the ``DataLoader``: a last batch that is not full is left out.
        sampler_drop_last: ``drop_last`` of the ``DistributedSampler``; by default the same.

    Raises:
        InvalidRequest: a count is below 1.
    """
    counts = {"rows": rows, "batch_size": batch_size, "world_size": world_size, "accumulation_steps": accumulation_steps}
    for name, count in counts.items():
        if count < 1:
            raise InvalidRequest(f"{name} is {count}; a whole number of 1 or more is wanted.")
    part = share(rows, world_size, drop_last if sampler_drop_last is None else sampler_drop_last)
    iterations = part // batch_size if drop_last else divide_up(part, batch_size)
    drawn = min(part, iterations * batch_size)
    return Epoch(
        rows=drawn,
        iterations=iterations,
        updates=divide_up(iterations, accumulation_steps),
        last_batch_size=drawn - (iterations - 1) * batch_size if iterations else 0,
        repeated=max(0, drawn * world_size - rows),
        left_out=max(0, rows - drawn * world_size),
    )
