"""Readings on the CPU are exact when the allocator is set before torch takes its first block, as in a worker.

And nothing may be left over: after every test the process has no children and no file descriptors that it had not before.
"""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from autobatch.devices.allocator import exact_allocator

exact_allocator()

# What libraries open once and keep: hypothesis' examples, the random device, what torch reads of the machine, drivers.
_KEPT = re.compile(r"\.hypothesis|^/dev/(u?random|nvidia)|^/proc/|^/sys/|\.so(\.|$)")


def descriptors() -> dict[str, str]:
    """Return this process's open file descriptors, by number, with what each leads to."""
    found = {}
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the one that the folder was read through
            continue
    return found


def children() -> set[int]:
    """Return the processes that this one started and that are there still, also as zombies."""
    try:
        tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
        return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}
    except OSError:  # a kernel without that file, another system
        return {child.pid for child in psutil.Process().children()}


def left_over(before: dict[str, str], running: set[int]) -> list[str]:
    """Return what there is that was not there ``before``, as text."""
    opened = [f"file descriptor {fd}: {to}" for fd, to in descriptors().items() if before.get(fd) != to and not _KEPT.search(to)]
    return opened + [f"process {pid}: {_name(pid)}" for pid in children() - running]


def _name(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline()) or "a zombie"
    except psutil.Error:
        return "ended"


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """Check that a test leaves no process and no file descriptor behind."""
    before, running = descriptors(), children()
    yield
    if not left_over(before, running):
        return
    gc.collect()
    deadline = time.monotonic() + 2
    while (left := left_over(before, running)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []
