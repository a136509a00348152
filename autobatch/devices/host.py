"""RAM as this process may use it."""

from __future__ import annotations

import os

import psutil

from autobatch.core.records import MemoryReading
from autobatch.devices.cgroup import ControlGroup


def host_memory(group: ControlGroup | None = None) -> MemoryReading:
    """Return RAM as this process may use it: the machine's, the container's or the shell's limit, whichever is smallest.

    Args:
        group: the container; ``None`` for the one that this process runs in.
    """
    machine, group = psutil.virtual_memory(), group or ControlGroup.of_this_process()
    capacity, free, source, notes = machine.total, machine.available, "psutil", []
    if group is not None and group.limit < capacity:
        capacity, source = group.limit, "cgroup"
        free = min(free, group.free())
        notes.append(f"the container's limit ({group.path}) is below the machine's RAM")
    left = _address_space_left()
    if left is not None and left < free:
        free = left
        notes.append("the shell's limit on address space (ulimit -v) is below the free RAM")
    return MemoryReading(capacity=capacity, free=free, source=source, notes=tuple(notes))


def _address_space_left() -> int | None:
    """Return the bytes of address space that this process may still map, ``None`` for no limit."""
    if os.name != "posix":  # pragma: no cover: another system
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else max(0, soft - psutil.Process().memory_info().vms)
