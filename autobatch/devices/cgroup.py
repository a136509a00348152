"""The memory limit of the container this process runs in, for both versions of Linux control groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 2**60  # version 1 writes a number near 2^63 for "no limit"


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """One control group with a memory limit.

    Attributes:
        path: its folder.
        limit: bytes its processes may use together.
        usage_file: file with the bytes in use, page cache included.
        cache_key: entry of ``memory.stat`` with the cache that the kernel drops on demand.
    """

    path: Path
    limit: int
    usage_file: str
    cache_key: str

    def free(self) -> int:
        """Return the bytes left in the group, droppable page cache counted as free."""
        used = int((self.path / self.usage_file).read_text())
        stat = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        return max(0, self.limit - used + int(stat.get(self.cache_key, 0)))

    @classmethod
    def of_this_process(cls, proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> ControlGroup | None:
        """Return the tightest limit on this process's group or one above it; ``None`` when nothing limits it."""
        try:
            lines = proc.read_text().splitlines()
        except OSError:
            return None
        found: list[ControlGroup] = []
        for line in lines:
            _, controllers, name = line.split(":", 2)
            if controllers == "":
                found += cls._walk(root, name, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                found += cls._walk(root / "memory", name, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        return min(found, key=lambda group: group.limit, default=None)

    @classmethod
    def _walk(cls, mount: Path, name: str, limit_file: str, usage_file: str, cache_key: str) -> list[ControlGroup]:
        """Return the limited groups from ``name`` up to the mount; inside a container the mount itself is the group."""
        groups = []
        folder = mount / name.lstrip("/")
        for path in dict.fromkeys([folder, *folder.parents, mount]):
            if path != mount and mount not in path.parents:
                continue
            try:
                limit = int((path / limit_file).read_text())
                (path / usage_file).read_text()
            except (OSError, ValueError):
                continue
            if limit < _UNLIMITED:
                groups.append(cls(path, limit, usage_file, cache_key))
        return groups
