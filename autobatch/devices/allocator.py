"""glibc's malloc, told to make resident memory follow the tensors; every function does nothing on another C library."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

from autobatch.core.units import KIB, MIB

# Blocks of this size or more come from the kernel, smaller ones from the heap.
_LARGE = 64 * KIB
# Room for small blocks: how much, in holes of which size; the largest objects that Python's own allocator takes, and its arenas.
_AHEAD, _SMALL = 4 * MIB, 60 * KIB
_OBJECT, _ARENA = 448, 256 * KIB
# mallopt keys (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def exact_allocator() -> None:
    """Take every block of 64 KiB or more from the kernel and give it back at once; steps get some 15 % slower for it."""
    _mallopt((_M_MMAP_THRESHOLD, _LARGE), (_M_TRIM_THRESHOLD, _LARGE), (_M_TOP_PAD, 0), (_M_ARENA_MAX, 1))


def usual_allocator() -> None:
    """Go back to speed: the values glibc's sliding thresholds reach in a process that frees large blocks."""
    _mallopt((_M_MMAP_THRESHOLD, 32 * MIB), (_M_TRIM_THRESHOLD, 64 * MIB), (_M_TOP_PAD, 128 * KIB), (_M_ARENA_MAX, 0))


def trim() -> None:
    """Give free blocks back to the kernel."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def filled_holes() -> Iterator[None]:
    """Take up the heap's free stretches, which malloc gives large blocks before it asks the kernel.

    A tensor in such a stretch would neither count against a limit on address space nor leave resident memory when it is freed.
    """
    library, held, size = _library(), [], 64 * MIB
    while library is not None and size >= _LARGE:
        block = library.malloc(size)
        if block and block < library.sbrk(0):  # mapped blocks lie above the heap
            held.append(block)
        else:
            library.free(block)
            size //= 2
    try:
        yield
    finally:
        for block in held:
            library.free(block)  # type: ignore[union-attr]


@contextlib.contextmanager
def small_blocks_ahead() -> Iterator[None]:
    """Lay up room for small blocks, of C and of Python, so that a trial's own need no address space and differ from no other's.

    Every second block is freed: the holes are too small for a tensor that counts. Of the Python objects, one stays in each arena and keeps
    it.
    """
    with contextlib.ExitStack() as kept:
        library = _library()
        if library is not None:
            blocks = [library.malloc(_SMALL) for _ in range(2 * _AHEAD // _SMALL)]
            for block in blocks[1::2]:
                kept.callback(library.free, block)
            for block in blocks[::2]:
                library.free(block)
        objects = [bytes(_OBJECT) for _ in range(2 * _AHEAD // _OBJECT)]
        kept.callback(objects[:: _ARENA // _OBJECT].clear)
        del objects
        yield


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        library.sbrk.restype, library.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
        library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    except (OSError, AttributeError):
        return None
    return library


def _mallopt(*settings: tuple[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for key, value in settings:
            library.mallopt(key, value)
