"""A high-water mark of this process's address space that can be set back, which the kernel's own cannot.

What a limit on address space refuses is address space, touched or not, so only a reading of address space says how far the limit is.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

# Beyond this many bytes nothing more is laid up: the addresses of a process end at 2**47.
_MOST = 2**44


class HighWater:
    """The highest address space since the last ``reset``, by laying up untouchable pages until now is as high as ever.

    Such pages cost neither memory nor commit charge, only addresses, and a limit on address space has to be raised by ``laid_up``.

    Args:
        read: returns the bytes of address space now, and the most there ever were.

    Attributes:
        laid_up: bytes that belong to the mark and not to what is measured; after ``lower`` too, for the readings of before.
    """

    def __init__(self, read: Callable[[], tuple[int, int]]) -> None:
        self._read, self._blocks = read, list[mmap.mmap]()
        self.laid_up = 0

    def reset(self) -> bool:
        """Start the mark again from now and return whether that was possible."""
        now, highest = self._read()
        if now < highest and self.laid_up + highest - now <= _MOST:
            try:
                self._blocks.append(mmap.mmap(-1, highest - now, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0))
            except OSError:
                return False
            self.laid_up += highest - now
            now, highest = self._read()
        return now >= highest

    def lower(self) -> None:
        """Give the addresses back."""
        while self._blocks:
            self._blocks.pop().close()

    def begin(self) -> None:
        """Count from nothing again."""
        self.lower()
        self.laid_up = 0
