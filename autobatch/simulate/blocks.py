"""What an allocator's segments are made of: blocks, and the pools that keep the free ones in order."""

from __future__ import annotations

from bisect import bisect_left, insort


class Block:
    """A stretch of one segment, handed out, free, or (in an expandable segment) not mapped."""

    __slots__ = ("address", "born", "free", "mapped", "next", "pool", "prev", "requested", "size")

    def __init__(self, address: int, size: int, pool: Pool, *, mapped: bool = True) -> None:
        self.address, self.size, self.pool, self.mapped = address, size, pool, mapped
        self.prev: Block | None = None
        self.next: Block | None = None
        self.free, self.requested, self.born = True, 0, 0


class Pool:
    """The free blocks for small or for large requests, ordered by size, then by address."""

    __slots__ = ("blocks", "finds", "origin", "page", "small", "tail")

    def __init__(self, small: bool, page: int) -> None:
        self.small, self.page = small, page
        self.blocks: list[tuple[int, int, Block]] = []
        self.finds = 0  # requests so far, the clock that garbage collection goes by
        self.tail: Block | None = None  # the end of the expandable segment, never mapped
        self.origin = 0  # where the expandable segment starts; its pages are counted from there

    def add(self, block: Block) -> None:
        """Take in a free block."""
        block.free, block.born = True, self.finds
        insort(self.blocks, (block.size, block.address, block))

    def remove(self, block: Block) -> None:
        """Take out a block."""
        del self.blocks[bisect_left(self.blocks, (block.size, block.address))]


def merge(block: Block, other: Block) -> Block:
    """Join two neighbours into the one at the lower address."""
    first, second = (block, other) if block.address < other.address else (other, block)
    first.size += second.size
    first.next = second.next
    if first.next is not None:
        first.next.prev = first
    return first


def cut(block: Block, size: int) -> None:
    """Cut a block in two; the second part has the same state."""
    rest = Block(block.address + size, block.size - size, block.pool, mapped=block.mapped)
    rest.prev, rest.next, rest.free = block, block.next, block.free
    if rest.next is not None:
        rest.next.prev = rest
    block.next, block.size = rest, size


def start_of_room(place: Block) -> Block:
    """Return the free block right before an unmapped one, else the unmapped one."""
    before = place.prev
    return before if before is not None and before.free and before.mapped else place


def free_run(block: Block | None) -> int:
    """Return the bytes from ``block`` on that are free or not mapped, without a gap."""
    size = 0
    while block is not None and block.free:
        size += block.size
        block = block.next
    return size


def room_behind(block: Block) -> int:
    """Return a block's bytes and the unmapped ones right behind it."""
    following = block.next
    return block.size + (following.size if following is not None and not following.mapped else 0)
