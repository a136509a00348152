"""The simulated caching allocator: its rules case by case, and what must hold for every sequence of requests."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch import InvalidRequest
from autobatch.core.units import GIB, KIB, MIB
from autobatch.simulate.allocator import Block, CachingAllocator, SimulatedOutOfMemory
from autobatch.simulate.allocator_settings import AllocatorSettings


def allocator(text: str = "", capacity: int = 2**62, *, capped: bool = False) -> CachingAllocator:
    return CachingAllocator(capacity, AllocatorSettings.parse(text), capped=capped)


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (21 * MIB, 22 * MIB, 22 * MIB),
    ],
)
def test_a_first_request_takes_a_segment_of_its_class(size: int, allocated: int, reserved: int) -> None:
    card = allocator()
    block = card.malloc(size)
    assert (card.requested, card.allocated, card.reserved) == (size, allocated, reserved)
    card.free(block)
    assert (card.requested, card.allocated, card.reserved) == (0, 0, reserved)
    card.release_cached()
    assert card.reserved == 0


def test_a_large_block_keeps_up_to_a_mebibyte_that_it_cannot_use() -> None:
    card = allocator()
    card.malloc(19 * MIB)
    assert (card.allocated, card.reserved) == (20 * MIB, 20 * MIB)
    card.malloc(20 * MIB + 512)  # a segment of 22 MiB: the rest is more than 1 MiB and is split off
    assert (card.allocated, card.reserved) == (40 * MIB + 512, 42 * MIB)


def test_the_best_fit_serves_and_neighbours_merge() -> None:
    card = allocator()
    blocks = [card.malloc(5 * MIB) for _ in range(4)]  # one segment of 20 MiB
    assert card.reserved == 20 * MIB
    card.free(blocks[1])
    card.free(blocks[2])
    assert sorted(block.size for block in card.blocks()) == [10 * MIB]
    assert card.malloc(9 * MIB).address == blocks[1].address
    assert card.reserved == 20 * MIB


def test_small_requests_never_take_large_blocks() -> None:
    card = allocator()
    card.free(card.malloc(20 * MIB))
    card.malloc(512)
    assert card.reserved == 22 * MIB


def test_what_is_cached_is_given_back_before_it_fails() -> None:
    card = allocator(capacity=100 * MIB)
    card.free(card.malloc(60 * MIB))
    held = card.malloc(80 * MIB)
    assert (card.retries, card.reserved) == (1, 80 * MIB)
    with pytest.raises(SimulatedOutOfMemory) as caught:
        card.malloc(30 * MIB)
    assert (caught.value.requested, card.retries) == (30 * MIB, 2)
    card.free(held)
    card.malloc(100 * MIB)


def test_a_small_block_left_in_a_segment_keeps_all_of_it() -> None:
    card = allocator(capacity=100 * MIB)
    blocks = [card.malloc(30 * MIB), card.malloc(60 * MIB)]
    card.free(blocks[1])
    card.malloc(2 * MIB)
    with pytest.raises(SimulatedOutOfMemory):
        card.malloc(65 * MIB)


def test_expandable_segments_use_what_lies_before_and_give_pages_back() -> None:
    plain, growing = allocator(capacity=100 * MIB), allocator("expandable_segments:True", capacity=100 * MIB)
    for card in (plain, growing):
        first, second = card.malloc(40 * MIB), card.malloc(40 * MIB)
        card.free(second)
        card.malloc(2 * MIB)
        if card is plain:
            with pytest.raises(SimulatedOutOfMemory):
                card.malloc(50 * MIB)
        else:
            card.malloc(50 * MIB)
            assert card.reserved == 100 * MIB
        card.free(first)
        card.release_cached()
    assert growing.reserved == 60 * MIB


def test_blocks_beyond_max_split_size_are_kept_whole() -> None:
    card = allocator("max_split_size_mb:64")
    card.free(card.malloc(100 * MIB))
    card.malloc(30 * MIB)
    assert card.reserved == 130 * MIB
    card.malloc(90 * MIB)
    assert (card.reserved, card.allocated) == (130 * MIB, 130 * MIB)
    tight = allocator("max_split_size_mb:64", capacity=250 * MIB)
    for block in [tight.malloc(100 * MIB), tight.malloc(120 * MIB)]:
        tight.free(block)
    tight.malloc(200 * MIB)
    assert (tight.retries, tight.reserved) == (0, 200 * MIB)


def test_garbage_is_collected_above_the_threshold_of_a_cap() -> None:
    card = allocator("garbage_collection_threshold:0.5", capacity=200 * MIB, capped=True)
    for block in [card.malloc(60 * MIB), card.malloc(70 * MIB)]:
        card.free(block)
    card.malloc(80 * MIB)
    assert card.reserved < 210 * MIB
    assert card.retries == 0


@pytest.mark.parametrize(
    ("text", "size", "rounded"),
    [
        ("roundup_power2_divisions:4", 1200 * KIB, 1280 * KIB),
        ("roundup_power2_divisions:8", 1200 * KIB, 1280 * KIB),
        ("roundup_power2_divisions:4", 2 * MIB, 2 * MIB),
        ("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]", 700 * MIB, 768 * MIB),
        ("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]", 100 * MIB + 1, 100 * MIB + 512),
    ],
)
def test_sizes_are_rounded_to_fractions_of_powers_of_two(text: str, size: int, rounded: int) -> None:
    assert allocator(text)._round(size) == rounded


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expandable_segments:yes", "expandable_segments:yes cannot be meant: True or False is wanted"),
        ("max_split_size_mb:10", "more than 20 MiB are wanted"),
        ("max_split_size_mb:many", "max_split_size_mb:many cannot be meant"),
        ("garbage_collection_threshold:1.5", "a fraction between 0 and 1"),
        ("roundup_power2_divisions:3", "a power of two is wanted"),
        ("roundup_power2_divisions:[256:1", "a bracket that is not closed"),
        ("expandable_segments", "'expandable_segments', which is no option:value pair"),
        ("split:3", r"unknown option 'split'\. Known: backend, "),
    ],
)
def test_settings_that_cannot_be_meant_are_named(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        AllocatorSettings.parse(text)


def test_settings_come_from_the_first_variable_that_is_set() -> None:
    read = AllocatorSettings.from_environment
    assert read({}) == AllocatorSettings()
    assert read({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}).expandable_segments
    both = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128, backend:native"}
    assert read(both) == AllocatorSettings(max_split_size=128 * MIB)


SETTINGS = ["", "expandable_segments:True", "max_split_size_mb:32", "garbage_collection_threshold:0.6", "roundup_power2_divisions:4"]
SIZES = st.one_of(st.integers(0, 4 * KIB), st.integers(MIB - KIB, MIB + KIB), st.integers(MIB, 24 * MIB), st.integers(1, 300 * MIB))


def check(card: CachingAllocator, held: list[Block], capacity: int) -> None:
    assert card.allocated == sum(block.size for block in held)
    assert card.requested == sum(block.requested for block in held) <= card.allocated <= card.reserved <= capacity
    assert card.reserved == card.allocated + sum(block.size for block in card.blocks())
    spans = sorted((block.address, block.address + block.size) for block in [*held, *card.blocks()])
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(SIZES, st.integers(0, 9)), max_size=60), st.sampled_from(SETTINGS), st.integers(1, 6), st.booleans())
def test_whatever_is_asked_no_byte_is_lost_and_none_is_given_twice(
    requests: list[tuple[int, int]], text: str, gigabytes: int, capped: bool
) -> None:
    capacity = gigabytes * GIB // 4
    peaks = []
    for _ in range(2):
        card, held = allocator(text, capacity, capped=capped), []
        for size, action in requests:
            if action < 4 and held:
                card.free(held.pop((size + action) % len(held)))
            elif action == 9:
                card.release_cached()
            else:
                try:
                    held.append(card.malloc(size))
                    assert held[-1].size >= size
                except SimulatedOutOfMemory:
                    assert card.reserved + size > capacity or text
            check(card, held, capacity)
        peaks.append((card.peak_allocated, card.peak_reserved, card.peak_requested, card.retries))
        while held:
            card.free(held.pop())
        # Everything is free: one block a segment.
        assert all(not (b.next and b.next.free and b.next.mapped and b.mapped) for b in card.blocks())
        if "expandable" not in text:
            assert all(block.prev is None and block.next is None for block in card.blocks())
        card.release_cached()
        assert (card.allocated, card.requested, card.reserved) == (0, 0, 0)
    assert peaks[0] == peaks[1]
