"""One search at a time on a card: two that probe it at once would each find what the other leaves."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from autobatch.core.errors import DeviceUnavailable

# How long a search waits for another one, in seconds: most take less.
WAIT = 540.0
_POLL = 0.05


@contextlib.contextmanager
def card_lock(card: str, name: str, *, wait: float = WAIT, folder: Path | None = None) -> Iterator[str]:
    """Hold the card for this process; gives a note where another search had to be waited for, else nothing.

    The lock ends with the process that holds it, however that ends.

    Args:
        card: what tells the card from others, its UUID.
        name: what its user calls it.
        wait: seconds to wait for another search.
        folder: where the lock lies; by default the folder for temporary files, which all users share.

    Raises:
        DeviceUnavailable: another search still has it.
    """
    from filelock import FileLock, Timeout

    place = folder or Path(tempfile.gettempdir())
    path = place / f"autobatch-{re.sub(r'[^A-Za-z0-9-]', '-', card)}.lock"
    lock, holder = FileLock(path, mode=0o666, thread_local=False), path.with_suffix(".holder")
    began, before = time.monotonic(), ""
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            before = _read(holder)
            lock.acquire(timeout=wait, poll_interval=_POLL)
    except Timeout:
        raise DeviceUnavailable(
            f"{name} is being searched by {_read(holder) or 'another process'}; waited {wait:g} s for it. Two searches at once would each "
            "find only what the other leaves. Try again when it has ended, or choose another card: CUDA_VISIBLE_DEVICES=…"
        ) from None
    except OSError as error:
        yield f"no lock on {name} ({error.strerror or error}): another search on it at the same time would go unnoticed"
        return
    try:
        with contextlib.suppress(OSError):
            holder.write_text(f"pid {os.getpid()} ({Path(sys.argv[0]).name or 'python'})")
        yield f"waited {time.monotonic() - began:.0f} s for {before or 'another process'} to end its search on {name}" if before else ""
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        lock.release()


def _read(holder: Path) -> str:
    """Return who holds the lock, as it wrote it down; empty while it has not."""
    with contextlib.suppress(OSError):
        return "".join(character for character in holder.read_text()[:200] if character.isprintable())
    return ""
