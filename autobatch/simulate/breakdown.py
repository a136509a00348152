"""Where the bytes are at the highest point of a step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from autobatch.simulate.affine import AffineTrace
from autobatch.simulate.recorder import ACTIVATION


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """The bytes asked for at the highest point.

    Attributes:
        phase: in which phase that is.
        by_tag: bytes by what they are there for, largest first.
        by_module: bytes of activations by the module that made them, largest first.
    """

    phase: str
    by_tag: tuple[tuple[str, int], ...]
    by_module: tuple[tuple[str, int], ...]


def breakdown(trace: AffineTrace, batch_size: int) -> Breakdown:
    """Return where the bytes of a step of ``batch_size`` rows are at its highest point."""
    sizes, storages = trace.sizes(batch_size), trace.of.storages
    now = highest = 0
    at = -1
    for position, event in enumerate(trace.events):
        now += sizes[event] if event >= 0 else -sizes[~event]
        if now > highest:
            highest, at = now, position
    alive: set[int] = set()
    for event in trace.events[: at + 1]:
        if event >= 0:
            alive.add(event)
        else:
            alive.discard(~event)
    tags: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for index in alive:
        tags[storages[index].tag] += sizes[index]
        if storages[index].tag == ACTIVATION:
            modules[storages[index].module or "loss"] += sizes[index]
    phase = next((name for start, name in reversed(trace.of.marks) if start <= at), "")
    return Breakdown(phase=phase, by_tag=tuple(tags.most_common()), by_module=tuple(modules.most_common()))
