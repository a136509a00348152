"""The CPU as a device: its memory is RAM, its limit a soft limit on address space that makes the allocator really fail.

Readings are exact because of four things. glibc is told to take every block of 64 KiB or more straight from the kernel and to
give it straight back, so that memory follows the tensors. Peaks are read in what the limit counts, and each phase of a step has its own
(``address_space.py``). What libraries reserve on first use (thread stacks, scratch space, lazily imported modules) is brought in before the
first trial, and small blocks have room laid up for them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from autobatch.core.errors import DeviceUnavailable
from autobatch.core.records import MemoryReading, Outcome, Peak
from autobatch.core.units import KIB, MIB
from autobatch.devices import allocator, oom
from autobatch.devices.address_space import HighWater
from autobatch.devices.forget import said_by
from autobatch.devices.host import host_memory

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_MAPS, _PAGES = Path("/proc/self/maps"), Path("/proc/self/pagemap")
# Address space for oneDNN's generated code in the first step of a trial; what was really generated is counted after it.
_CODE_ROOM = 16 * MIB
# Small blocks lie in pages that one process has mapped already and another has not: a trial is held to that much less.
_SPARE = 256 * KIB

_SLOWER_STEPS = "step times were taken with an allocator that gives memory back at once; training itself is faster"
# oneDNN says the same of a kernel it has not and of memory it does not get. It is memory where the same step ran with fewer rows, so
# that its kernels exist, or where much of the limit is in use.
_ONEDNN = ("could not create a", "could not execute a")
_NEARLY = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Process:
    """This process's memory in bytes, as the kernel counts it."""

    virtual: int
    highest_virtual: int
    highest: int
    anonymous: int
    files: int

    @classmethod
    def read(cls) -> _Process:
        table = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if line.startswith(("Vm", "Rss")))

        def amount(key: str) -> int:
            return int(table.get(key, "0 kB").split()[0]) * KIB

        return cls(
            virtual=amount("VmSize"),
            highest_virtual=amount("VmPeak"),
            highest=amount("VmHWM"),
            anonymous=amount("RssAnon"),
            files=amount("RssFile") + amount("RssShmem"),
        )


class CpuDevice:
    """RAM, held to a limit by ``RLIMIT_AS``; one instance a process at a time.

    Raises:
        DeviceUnavailable: the system offers no resettable high-water mark or no enforced address-space limit (anything but Linux).
    """

    name = "cpu"
    notes: tuple[str, ...] = (_SLOWER_STEPS,)
    capability: tuple[int, int] | None = None
    is_host, spills = True, False

    def __init__(self) -> None:
        if sys.platform != "linux" or not os.access(_CLEAR_REFS, os.W_OK):
            raise DeviceUnavailable(
                f"CPU memory cannot be held to a limit on {platform.system()}: it needs Linux's /proc/self/clear_refs and RLIMIT_AS, "
                "so no out-of-memory error could be provoked safely. Probe on a CUDA device (device='cuda'), or run this in a Linux "
                "container; for any loop of your own, autobatch.search(run) needs no limit."
            )
        self.description = f"CPU, {os.cpu_count()} cores"
        self._limit = 0
        self._ceilings: tuple[int, int] | None = None  # the address-space limits outside the trial, None outside a trial
        self._resets, self._exact = 0, False
        self._water = HighWater(_address_space)
        # Address space and anonymous bytes when the first trial began, less tensors and generated code. What libraries keep from then
        # on counts in every trial, as a workspace does on a card.
        self._floors: tuple[int, int] | None = None

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Hold the allocator settings that make readings exact, for as long as the probing lasts."""
        allocator.exact_allocator()
        self._floors = None
        try:
            _bring_in_libraries()
            with allocator.small_blocks_ahead():
                yield
        finally:
            allocator.usual_allocator()

    def memory(self) -> MemoryReading:
        """Return RAM as this process may use it."""
        return host_memory()

    @contextlib.contextmanager
    def cap(self, limit: int, held: int) -> Iterator[None]:
        """Let tensors take at most ``limit`` bytes, ``held`` of which are resident now; more raises as on a full machine."""
        import resource

        before = resource.getrlimit(resource.RLIMIT_AS)
        with allocator.filled_holes():
            self._limit, self._ceilings, self._resets = limit, before, 0
            self._water.begin()
            if self._floors is None:
                now, (mapped, resident) = _Process.read(), _generated_code()
                self._floors = now.virtual - held - mapped, now.anonymous - held - resident
            try:
                self._start_again(_CODE_ROOM)
                yield
            finally:
                self._water.lower()
                resource.setrlimit(resource.RLIMIT_AS, before)
                self._ceilings = None

    def _start_again(self, room: int) -> None:
        """Start the high-water marks again from now, and hold what comes to the limit and ``room``."""
        import resource

        # Under a limit of the user's own there are no addresses to spare.
        self._exact = False
        if self._ceilings is not None and self._ceilings[0] == resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_AS, self._ceilings)
            self._exact = self._water.reset()
        self._set_ceiling(room)
        _CLEAR_REFS.write_text("5")

    def _set_ceiling(self, room: int) -> None:
        """Let the address space grow to the limit: oneDNN's generated code, as large as the shapes are new, comes on top."""
        import resource

        if self._ceilings is not None and self._floors is not None:
            soft, hard = (sys.maxsize if value == resource.RLIM_INFINITY else value for value in self._ceilings)
            wanted = self._floors[0] + self._limit - _SPARE + _generated_code()[0] + room + self._water.laid_up
            resource.setrlimit(resource.RLIMIT_AS, (min(wanted, soft, hard), self._ceilings[1]))

    def reset_peaks(self) -> None:
        """Start the high-water mark again from what is resident now."""
        self._resets += 1
        # The first step generates its code: from the second on the limit is exact.
        self._start_again(0 if self._resets > 1 else _CODE_ROOM)

    def peak(self) -> Peak:
        """Return the bytes of tensors at the highest point since the last reset, counted as the limit counts them where that can be.

        That is address space, touched or not. Under a limit on it of the user's own, it is what was resident. What is seen above the
        limit lay in small blocks of pages mapped before the trial: the limit refuses everything else.
        """
        now, (mapped, resident) = _Process.read(), _generated_code()
        floors = self._floors if self._floors is not None else (now.virtual, now.anonymous)
        if self._exact:
            tensors = now.highest_virtual - self._water.laid_up - floors[0] - mapped + _SPARE
        else:
            tensors = now.highest - now.files - floors[1] - resident
        return Peak(allocated=min(max(0, tensors), self._limit))

    def allocated(self) -> int:
        """Return the anonymous bytes resident now: tensors, and the interpreter's own objects."""
        return _Process.read().anonymous

    def retries(self) -> int | None:
        """Return ``None``: the CPU allocator keeps no cache to give back."""
        return None

    def driver_used(self) -> int | None:
        """Return ``None``: there is no driver."""
        return None

    def synchronize(self) -> None:
        """Do nothing: CPU operators return when they are done."""

    def release(self) -> None:
        """Give free blocks back to the kernel."""
        allocator.trim()

    def classify(self, error: BaseException, *, ran_before: bool = False) -> Outcome | None:
        """Return the outcome ``error`` stands for; RAM is this device's memory, so running out of it is ``oom``."""
        known = oom.classify(error, on_cpu=True)
        if known is not None or not any(sign in said_by(error) for sign in _ONEDNN):
            return known
        return Outcome.OOM if ran_before or self.peak().allocated > _NEARLY * self._limit else None

    def environment(self) -> dict[str, str]:
        """Return the processor and the thread count that step times belong to."""
        import torch

        return {"processor": platform.machine(), "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}


def _address_space() -> tuple[int, int]:
    now = _Process.read()
    return now.virtual, now.highest_virtual


def _generated_code() -> tuple[int, int]:
    """Return the bytes that code made at run time takes, in address space and resident: executable, and of no file."""
    mapped = resident = 0
    with _PAGES.open("rb", buffering=0) as pages:
        for line in _MAPS.read_text().splitlines():
            addresses, rights, _, _, inode, *_ = line.split()
            if "x" not in rights or inode != "0" or line.endswith("]"):
                continue
            start, end = (int(address, 16) for address in addresses.split("-"))
            mapped += end - start
            pages.seek(start // mmap.PAGESIZE * 8)
            entries = pages.read((end - start) // mmap.PAGESIZE * 8)
            resident += sum(entry >> 7 for entry in entries[7::8]) * mmap.PAGESIZE  # bit 63 of each entry: present
    return mapped, resident


def _bring_in_libraries() -> None:
    """Run a small training step, so that what libraries reserve on first use is not taken for the model's memory."""
    import torch

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        body = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.Flatten(), torch.nn.LazyLinear(512))
        rows = torch.randn(64, 3, 18, 18)
        body(rows)
        for kind in (torch.optim.SGD, torch.optim.AdamW):
            body(rows).square().mean().backward()
            kind(body.parameters(), lr=1e-3).step()
        # A wide and flat product makes MKL take the largest buffers it ever keeps.
        head, features = torch.nn.Linear(8192, 10), torch.randn(607, 8192, requires_grad=True)
        head(features).square().mean().backward()
