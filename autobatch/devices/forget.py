"""Letting go of what a caught exception holds: its tracebacks keep the frames, the frames keep the tensors."""

from __future__ import annotations

import traceback
from collections.abc import Iterator


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error`` and every exception behind it: causes, contexts and members of groups, each once."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [one.__context__, one.__cause__, *getattr(one, "exceptions", ())]


def forget(error: BaseException) -> None:
    """Clear the frames that ``error`` and everything behind it keep alive; frames that still run are left alone."""
    for one in chain(error):
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None
