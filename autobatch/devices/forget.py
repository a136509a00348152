"""Letting go of what a caught exception holds: its tracebacks keep the frames, the frames keep the tensors."""

from __future__ import annotations

import gc
import sys
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
        waiting += [one.__context__, one.__cause__, *_members(one)]


def _members(error: BaseException) -> list[BaseException]:
    """Return the members of an exception group, Python's own (3.11) or a package's: others may call anything ``exceptions``."""
    members = getattr(error, "exceptions", None)
    return [one for one in members if isinstance(one, BaseException)] if isinstance(members, (list, tuple)) else []


def said_by(error: BaseException) -> str:
    """Return what ``error`` says, whatever its own method does when it is asked."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 it is the user's
        return f"({type(error).__name__}, an exception that cannot be shown as text)"


def first_line(error: BaseException) -> str:
    """Return the first line of what ``error`` says, its type where it says nothing."""
    return (said_by(error).strip().splitlines() or [type(error).__name__])[0]


def forget(error: BaseException) -> None:
    """Clear the frames that ``error`` and everything behind it keep alive; frames that still run are left alone."""
    for one in chain(error):
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None


def give_back() -> None:
    """Free what lies in reference cycles and in torch's caches on a card, after ``forget`` and outside any ``except`` block."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.clear_autocast_cache()  # weights that were cast for a step that broke off
    gc.collect()
    if torch is not None and torch.cuda.is_initialized():  # pragma: no cover: needs a card
        torch.cuda.empty_cache()
