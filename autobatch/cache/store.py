"""Kept plans as files: JSON that is checked when it is read, never anything that could run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from autobatch.core.plan import BatchPlan
from autobatch.core.record_json import from_plain
from autobatch.core.text import plain

_NAME = re.compile(r"[0-9a-f]{16}\.json|\.autobatch-.*\.tmp")
_LARGEST = 16 * 2**20  # bytes; a plan of a thousand probes has a quarter of a million
# Not everywhere, and 0 where they are not: a link is not followed, a pipe is not waited for.
_CAREFUL = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a kept plan comes from.

    Attributes:
        key: SHA-256 of all that was asked, in hexadecimal.
        made: when it was measured, as ISO 8601 writes it.
        what: the model's class or the TARGET, for people.
    """

    key: str
    made: str
    what: str

    def __post_init__(self) -> None:
        datetime.fromisoformat(self.made)

    @property
    def when(self) -> str:
        """When it was measured, for people: ``"2026-01-31 12:00 UTC"``."""
        return datetime.fromisoformat(self.made).strftime("%Y-%m-%d %H:%M %Z").rstrip()


@dataclass(frozen=True, slots=True)
class Kept:
    """One plan in a folder of kept plans."""

    path: Path
    origin: Origin
    plan: BatchPlan


class PlanCache:
    """A folder of kept plans, each a file that ``autobatch explain`` can show.

    Files are the user's alone (0600) and appear whole or not at all. What cannot be trusted is passed over: a link, another user's file,
    damaged JSON, the schema of a newer version, a plan that answers something else.

    Args:
        folder: where they lie; by default the user's cache directory. It is made (0700) when the first plan is kept.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        from platformdirs import user_cache_path

        self.folder = user_cache_path("autobatch", appauthor=False) / "plans" if folder is None else Path(folder)

    def load(self, key: str) -> tuple[Kept | None, str]:
        """Return what is kept for ``key``, or nothing and, where there is something that was not trusted, a note that says why."""
        path = self._path(key)
        try:
            kept = _read(path)
            if kept.origin.key != key:
                raise ValueError("it answers something else")
        except FileNotFoundError:
            return None, ""
        except (OSError, ValueError, RecursionError) as error:
            return None, f"the cache's {path.name} was ignored: {_why(error)}"
        return kept, ""

    def save(self, origin: Origin, plan: BatchPlan) -> str:
        """Keep ``plan``; returns a note where that cannot be done (a read-only home, a full disk), else nothing."""
        text = json.dumps({**plan.to_dict(), "cache": asdict(origin)}, indent=2, allow_nan=False)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_whole(self._path(origin.key), text.encode())
        except OSError as error:
            return f"not kept in the cache: {_why(error)}"
        return ""

    def entries(self) -> tuple[list[Kept], int]:
        """Return the plans that are kept, newest first, and how many files were ignored."""
        found, ignored = [], 0
        for path in self._files():
            try:
                found.append(_read(path))
            except (OSError, ValueError, RecursionError):
                ignored += 1
        return sorted(found, key=lambda kept: kept.origin.made, reverse=True), ignored

    def clear(self) -> tuple[int, int]:
        """Remove what is kept; returns how many files went and how many could not be removed."""
        removed = failed = 0
        for path in self._files():
            try:
                path.unlink()
                removed += 1
            except OSError:
                failed += 1
        return removed, failed

    def _path(self, key: str) -> Path:
        return self.folder / f"{key[:16]}.json"

    def _files(self) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            yield from [path for path in sorted(self.folder.iterdir()) if _NAME.fullmatch(path.name)]


def _read(path: Path) -> Kept:
    """Return the plan in ``path``.

    Raises:
        OSError: it cannot be read, or is a link.
        ValueError: it is not a file of this user's, or holds no plan that can be read.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _CAREFUL)) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no plain file")
        if os.name == "posix" and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
            raise ValueError("another user could have written it")
        data = stream.read(_LARGEST)
    text = data.decode()
    plan = BatchPlan.from_json(text)
    return Kept(path, from_plain(Origin, json.loads(text).get("cache"), "cache"), plan)


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file that only this user may read, and that nobody ever sees half written.

    Raises:
        OSError: it could not be written; nothing is left of it.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=".autobatch-", suffix=".tmp", dir=path.parent)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _why(error: Any) -> str:
    if isinstance(error, OSError):
        return plain(f"{error.strerror or error} ({error.filename})" if error.filename else str(error.strerror or error))
    return plain(str(error))
