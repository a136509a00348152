"""glibc's malloc, told to make resident memory follow the tensors; every function does nothing on another C library."""

from __future__ import annotations

import contextlib
import ctypes

from autobatch.core.units import KIB, MIB

# mallopt keys (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def exact_allocator() -> None:
    """Take every block of 64 KiB or more from the kernel and give it back at once; steps get some 15 % slower for it."""
    _mallopt((_M_MMAP_THRESHOLD, 64 * KIB), (_M_TRIM_THRESHOLD, 128 * KIB), (_M_ARENA_MAX, 1))


def usual_allocator() -> None:
    """Go back to speed: the values glibc's sliding thresholds reach in a process that frees large blocks."""
    _mallopt((_M_MMAP_THRESHOLD, 32 * MIB), (_M_TRIM_THRESHOLD, 64 * MIB), (_M_ARENA_MAX, 0))


def trim() -> None:
    """Give free blocks back to the kernel."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt(*settings: tuple[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for key, value in settings:
            library.mallopt(key, value)
