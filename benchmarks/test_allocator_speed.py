"""How fast the simulated allocator replays: a million events."""

from __future__ import annotations

import random

import pytest

from autobatch.core.units import MIB
from autobatch.simulate.allocator import CachingAllocator
from autobatch.simulate.allocator_settings import AllocatorSettings

EVENTS = 1_000_000


def training_like(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Return ``(size, slot)`` to allocate and ``(-1, slot)`` to free: a forward pass that keeps, a backward pass that gives back."""
    draw = random.Random(seed)
    events: list[tuple[int, int]] = []
    while len(events) < count:
        slots = range(400)
        sizes = [draw.choice((2048, 65536, 3 * MIB, 12 * MIB, 40 * MIB)) + 512 * draw.randrange(8) for _ in slots]
        events += [(size, slot) for slot, size in enumerate(sizes)]
        events += [(-1, slot) for slot in reversed(slots)]
    return events[:count]


@pytest.mark.parametrize("conf", ["", "expandable_segments:True"])
def test_a_million_events(benchmark: object, conf: str) -> None:
    events = training_like(EVENTS)

    def replay() -> int:
        card, live = CachingAllocator(settings=AllocatorSettings.parse(conf)), {}
        for size, slot in events:
            if size < 0:
                card.free(live.pop(slot))
            else:
                live[slot] = card.malloc(size)
        return card.peak_reserved

    assert benchmark.pedantic(replay, rounds=2) > 0  # type: ignore[attr-defined]
