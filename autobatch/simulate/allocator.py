"""The CUDA caching allocator under a capacity: PyTorch's native backend, one stream, replayed block by block.

Rules after PyTorch's ``c10/cuda/CUDACachingAllocator.cpp``. Requests are rounded to 512 bytes; up to 1 MiB they come from 2 MiB segments,
below 10 MiB from 20 MiB segments, beyond from a segment of their own rounded to 2 MiB. The best fitting free block serves a request and is
split when enough is left; a freed block merges with its neighbours. What no free block serves needs a new segment; where the capacity
has no room for one, every segment that is free as a whole is given back, and it is tried once more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from autobatch.core.units import MIB
from autobatch.simulate.allocator_settings import AllocatorSettings
from autobatch.simulate.blocks import Block, Pool, cut, free_run, merge, room_behind, start_of_room

_MIN_BLOCK = 512
_SMALL = MIB  # the largest request served from the small pool
_SMALL_SEGMENT = 2 * MIB
_MIN_LARGE = 10 * MIB
_ROUND_LARGE = 2 * MIB
_UNLIMITED = 2**62


class SimulatedOutOfMemory(Exception):
    """The capacity has no room for a request, also after every unused segment was given back.

    Attributes:
        requested: bytes of the request.
    """

    def __init__(self, requested: int) -> None:
        super().__init__(f"{requested} bytes do not fit")
        self.requested = requested


class CachingAllocator:
    """Allocates under ``capacity`` bytes as PyTorch would on a card that offers as much.

    Attributes:
        allocated: bytes in blocks that are handed out; ``peak_allocated`` is its highest.
        requested: bytes that were asked for in them; ``peak_requested`` is its highest.
        reserved: bytes obtained from the card; ``peak_reserved`` is its highest.
        retries: times every unused segment had to be given back.
    """

    def __init__(self, capacity: int = _UNLIMITED, settings: AllocatorSettings | None = None, *, capped: bool = False) -> None:
        self._capacity, self._settings, self._capped = capacity, settings or AllocatorSettings(), capped
        self._small = Pool(True, _SMALL_SEGMENT)
        self._large = Pool(False, self._settings.large_segment)
        self._max_split = self._settings.max_split_size or _UNLIMITED
        self._rounds_by_powers = any(steps > 1 for steps in self._settings.roundup_power2_divisions)
        self._next_address = _ROUND_LARGE
        self.allocated = self.requested = self.reserved = 0
        self.peak_allocated = self.peak_requested = self.peak_reserved = 0
        self.retries = 0

    def malloc(self, size: int) -> Block:
        """Return a block for ``size`` bytes.

        Raises:
            SimulatedOutOfMemory: there is no room for it.
        """
        rounded = self._round(size)
        pool = self._small if rounded <= _SMALL else self._large
        pool.finds += 1
        block = self._find(pool, rounded) or self._obtain(pool, rounded)
        if block is None:
            raise SimulatedOutOfMemory(size)
        if self._should_split(block, rounded):
            self._split(block, rounded)
        block.free, block.requested = False, size
        self.allocated += block.size
        self.requested += size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        if self.requested > self.peak_requested:
            self.peak_requested = self.requested
        return block

    def free(self, block: Block) -> None:
        """Take back a block."""
        self.allocated -= block.size
        self.requested -= block.requested
        block.requested = 0
        pool = block.pool
        for other in (block.prev, block.next):
            if other is not None and other.free and other.mapped:
                pool.remove(other)
                block = merge(block, other)
        pool.add(block)

    def release_cached(self) -> None:
        """Give back every segment that is free as a whole: ``torch.cuda.empty_cache``."""
        for pool in (self._small, self._large):
            for _, _, block in list(pool.blocks):
                if self._settings.expandable_segments:
                    self._unmap(block)
                elif block.prev is None and block.next is None:
                    pool.remove(block)
                    self.reserved -= block.size

    def blocks(self) -> Iterable[Block]:
        """Yield every free block."""
        for pool in (self._small, self._large):
            yield from (block for _, _, block in pool.blocks)

    def _round(self, size: int) -> int:
        if size < _MIN_BLOCK:
            return _MIN_BLOCK
        if self._rounds_by_powers:
            steps = self._settings.divisions(size)
            if steps > 1 and size > _MIN_BLOCK * steps:
                if size & (size - 1) == 0:
                    return size
                step = (1 << (size.bit_length() - 1)) // steps
                return -(-size // step) * step if step else 1 << size.bit_length()
        return (size + _MIN_BLOCK - 1) // _MIN_BLOCK * _MIN_BLOCK

    def _find(self, pool: Pool, size: int) -> Block | None:
        """Take the best fitting free block; the limits on splitting reject it rather than search on."""
        blocks = pool.blocks
        index = bisect_left(blocks, (size,))
        if index == len(blocks):
            return None
        if self._settings.expandable_segments:
            while index + 1 < len(blocks) and room_behind(blocks[index + 1][2]) < room_behind(blocks[index][2]):
                index += 1
        found = blocks[index][2]
        if size < self._max_split <= found.size:
            return None
        if size >= self._max_split and found.size >= size + self._settings.max_non_split_rounding:
            return None
        del blocks[index]
        return found

    def _obtain(self, pool: Pool, size: int) -> Block | None:
        """Take a new segment, after giving back what is unused where there is no room for it."""
        if self._capped and self._settings.garbage_collection_threshold:
            self._collect_garbage()
        block = self._new(pool, size)
        if block is None and self._settings.max_split_size and self._release_oversize(pool, size):
            block = self._new(pool, size)
        if block is None:
            self.retries += 1
            self.release_cached()
            block = self._new(pool, size)
        return block

    def _new(self, pool: Pool, size: int) -> Block | None:
        if pool.small:
            segment = _SMALL_SEGMENT
        elif size < _MIN_LARGE:
            segment = self._settings.large_segment
        else:
            segment = -(-size // _ROUND_LARGE) * _ROUND_LARGE
        if self._settings.expandable_segments:
            return self._expand(pool, size)
        if self.reserved + segment > self._capacity:
            return None
        block = Block(self._next_address, segment, pool)
        self._next_address += segment + _ROUND_LARGE  # segments never touch
        self._reserve(segment)
        return block

    def _reserve(self, size: int) -> None:
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _should_split(self, block: Block, size: int) -> bool:
        left = block.size - size
        if block.pool.small or self._settings.expandable_segments:
            return left >= _MIN_BLOCK
        return size < self._max_split and left > _SMALL

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.size - size, block.pool)
        rest.prev, rest.next = block, block.next
        if rest.next is not None:
            rest.next.prev = rest
        block.next, block.size = rest, size
        block.pool.add(rest)

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """Give back unused blocks that are never split: one that is large enough, else the largest until their sum is."""
        wanted = max(size, self._max_split)
        whole = [block for _, _, block in pool.blocks if block.size >= self._max_split and block.prev is None and block.next is None]
        enough = next((block for block in whole if block.size >= wanted), None)
        chosen = [enough] if enough is not None else whole[::-1]
        given = 0
        for block in chosen:
            pool.remove(block)
            self.reserved -= block.size
            given += block.size
            if given >= wanted:
                return True
        return False

    def _collect_garbage(self) -> None:
        """Give back whole segments of the large pool, the longest unused first, until the threshold is kept."""
        excess = self.reserved - int(self._settings.garbage_collection_threshold * self._capacity)
        pool = self._large
        while excess > 0:
            whole = [block for _, _, block in pool.blocks if block.prev is None and block.next is None]
            if not whole:
                return
            mean = sum(pool.finds - block.born for block in whole) / len(whole)
            for block in [block for block in whole if pool.finds - block.born >= mean]:
                pool.remove(block)
                self.reserved -= block.size
                excess -= block.size

    def _expand(self, pool: Pool, size: int) -> Block | None:
        """Map pages at the lowest place of the pool's segment that has room for ``size`` bytes."""
        block = self._lowest_room(pool, size)
        if block.mapped:
            pool.remove(block)
        elif not self._map(block, size):
            return None
        while block.size < size:
            following = block.next
            assert following is not None
            if not self._map(following, size - block.size):
                pool.add(block)
                return None
            block = merge(block, following)
            after = block.next
            if after is not None and after.free and after.mapped:
                pool.remove(after)
                block = merge(block, after)
        return block

    def _lowest_room(self, pool: Pool, size: int) -> Block:
        if pool.tail is None:
            pool.origin = self._next_address
            pool.tail = Block(pool.origin, _UNLIMITED, pool, mapped=False)
            self._next_address += _UNLIMITED
        best, place = pool.tail, pool.tail
        while place.prev is not None:
            place = place.prev
            if not place.mapped:
                best = place if free_run(start_of_room(place)) >= size else best
        return start_of_room(best)

    def _map(self, block: Block, size: int) -> bool:
        """Map whole pages from the start of an unmapped block; what is left of it stays unmapped behind them."""
        pages = min(-(-size // block.pool.page) * block.pool.page, block.size)
        if self.reserved + pages > self._capacity:
            return False
        if pages < block.size:
            rest = Block(block.address + pages, block.size - pages, block.pool, mapped=False)
            rest.prev, rest.next = block, block.next
            if rest.next is not None:
                rest.next.prev = rest
            block.next, block.size = rest, pages
            if block.pool.tail is block:
                block.pool.tail = rest
        block.mapped = True
        self._reserve(pages)
        return True

    def _unmap(self, block: Block) -> None:
        """Give back the whole pages inside a free block of an expandable segment."""
        pool, page, origin = block.pool, block.pool.page, block.pool.origin
        start = -(-(block.address - origin) // page) * page + origin
        end = (block.address + block.size - origin) // page * page + origin
        if end <= start:
            return
        pool.remove(block)
        if start > block.address:
            cut(block, start - block.address)
            pool.add(block)
            assert block.next is not None
            block = block.next
        if block.address + block.size > end:
            cut(block, end - block.address)
            assert block.next is not None
            pool.add(block.next)
        block.mapped = False
        self.reserved -= block.size
        for other in (block.prev, block.next):
            if other is not None and not other.mapped:
                is_tail = other is pool.tail or block is pool.tail
                block = merge(block, other)
                if is_tail:
                    pool.tail = block
