"""Recordings of training steps on real cards: their file format, and the replay that holds the simulated allocator against them.

A file is gzip'd JSON, one workload on one card. Each run began in a fresh process with nothing allocated, so that its history can be
replayed from the first request on. Histories are kept by columns: one letter an event, the step to its address, and the difference
between its size and the last one there, which is mostly 0.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from autobatch.simulate.allocator import CachingAllocator, SimulatedOutOfMemory
from autobatch.simulate.allocator_settings import AllocatorSettings
from autobatch.simulate.blocks import Block, Pool

FORMAT = 1
# The allocator's smallest block: addresses are counted in it.
GRAIN = 512
_LETTERS = {
    "alloc": "a",
    "free_requested": "r",
    "free_completed": "c",
    "segment_alloc": "A",
    "segment_free": "F",
    "segment_map": "M",
    "segment_unmap": "U",
    "oom": "o",
    "snapshot": "s",
}
_ACTIONS = {letter: action for action, letter in _LETTERS.items()}
_GROWS, _SHRINKS = ("segment_alloc", "segment_map"), ("segment_free", "segment_unmap")
_NOWHERE = ("oom", "snapshot")
_ANSWERED = ("alloc", "free_completed", "oom")
_UNLIMITED = 2**62


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that the allocator did.

    Attributes:
        action: as torch calls it.
        address: in units of 512 bytes, counted from the lowest segment with the gaps between segments closed; 0 where there is none.
        size: bytes.
        stream: number of the stream, in the order of appearance.
    """

    action: str
    address: int
    size: int
    stream: int = 0


def events_from_torch(trace: Sequence[Mapping[str, Any]]) -> tuple[Event, ...]:
    """Return the events of one of ``torch.cuda.memory._snapshot()["device_traces"]``; kinds that are not about memory are left out.

    Raises:
        ValueError: it begins after the allocator had segments.
    """
    told = [row for row in trace if row["action"] in _LETTERS]
    spans = _merged((int(row["addr"]), int(row["size"])) for row in told if row["action"] in _GROWS)
    places = [sum(length // GRAIN + 1 for _, length in spans[:index]) for index in range(len(spans))]
    starts = [start for start, _ in spans]
    streams: dict[int, int] = {}

    def place(row: Mapping[str, Any]) -> int:
        if row["action"] in _NOWHERE:
            return 0
        index = bisect_right(starts, int(row["addr"])) - 1
        if index < 0 or int(row["addr"]) >= starts[index] + spans[index][1]:
            raise ValueError("the history begins after the allocator had taken memory; record from the first request on")
        return places[index] + (int(row["addr"]) - starts[index]) // GRAIN

    return tuple(
        Event(str(row["action"]), place(row), int(row["size"]), streams.setdefault(int(row.get("stream", 0)), len(streams))) for row in told
    )


def _merged(spans: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return stretches ``(start, length)`` in order, those that overlap or touch joined."""
    joined: list[tuple[int, int]] = []
    for start, length in sorted(spans):
        if joined and start <= sum(joined[-1]):
            first, known = joined[-1]
            joined[-1] = first, max(known, start + length - first)
        else:
            joined.append((start, length))
    return joined


def encode(events: Sequence[Event]) -> dict[str, Any]:
    """Return the columns of a history, for JSON."""
    addresses, sizes, before = [], [], 0
    expected: dict[tuple[bool, int], int] = {}
    for event in events:
        address = before if event.action in _NOWHERE else event.address
        key = event.action.startswith("segment"), address
        addresses.append(address - before)
        sizes.append(event.size - expected.get(key, 0))
        expected[key], before = event.size, address
    return {
        "actions": "".join(_LETTERS[event.action] for event in events),
        "addresses": addresses,
        "sizes": sizes,
        "streams": [[stream, len(list(run))] for stream, run in groupby(event.stream for event in events)],
    }


def decode(columns: Mapping[str, Any]) -> tuple[Event, ...]:
    """Return the events whose columns ``encode`` made."""
    streams = [stream for stream, count in columns["streams"] for _ in range(count)]
    events, before = [], 0
    expected: dict[tuple[bool, int], int] = {}
    for letter, step, surplus, stream in zip(columns["actions"], columns["addresses"], columns["sizes"], streams, strict=True):
        action, address = _ACTIONS[letter], before + step
        key = action.startswith("segment"), address
        size = expected.get(key, 0) + surplus
        expected[key], before = size, address
        events.append(Event(action, 0 if action in _NOWHERE else address, size, stream))
    return tuple(events)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A few training steps of one batch size in a process of its own.

    Attributes:
        batch_size: rows.
        cap: bytes that the allocator was held to, ``None`` for the whole card.
        outcome: ``"fit"``, ``"oom"``, ``"error"``, ``"timeout"`` or ``"died"``.
        message: first line of what was raised.
        peaks: by phase (``forward_backward``, ``optimizer``), the highest ``allocated``, ``requested`` and ``reserved`` bytes.
        retries: times the allocator gave its cache back and tried again.
        context: bytes on the card beside what the allocator reserved, ``None`` where the run gave no figures.
        events: what the allocator did, from the first request on.
    """

    batch_size: int
    cap: int | None = None
    outcome: str = "fit"
    message: str = ""
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)
    retries: int = 0
    context: int | None = None
    events: tuple[Event, ...] = ()

    @property
    def peak_allocated(self) -> int:
        """Highest bytes in blocks that were handed out."""
        return max((peak["allocated"] for peak in self.peaks.values()), default=0)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One workload of the zoo on one card.

    Attributes:
        workload: its name.
        scale: what its widths and sides were multiplied by.
        card: name, compute capability, bytes, versions, settings of the allocator, workspaces, date.
        runs: what was run.
        smallest_cap: ``{"batch_size", "cap"}`` of the least bytes, to 8 MiB, under which the steps complete; empty where not sought.
        largest: ``{"cap", "batch_size"}`` of the largest batch under a small cap; empty where not sought.
        message: why something that was sought is missing.
    """

    workload: str
    scale: int
    card: dict[str, Any]
    runs: tuple[Run, ...]
    smallest_cap: dict[str, int] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)
    message: str = ""


def write(recording: Recording, path: Path) -> None:
    """Write ``recording`` to ``path``, the same bytes for the same content."""
    document = {"format": FORMAT, **dataclasses.asdict(recording)}
    for row, run in zip(document["runs"], recording.runs, strict=True):
        row["history"] = encode(run.events)
        del row["events"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(document, separators=(",", ":")).encode(), 9, mtime=0))


def read(path: Path) -> Recording:
    """Return the recording at ``path``.

    Raises:
        ValueError: it is of another format.
    """
    document = json.loads(gzip.decompress(path.read_bytes()))
    if document.pop("format") != FORMAT:
        raise ValueError(f"{path} is of another format than {FORMAT}")
    runs = [Run(events=decode(row.pop("history")), **row) for row in document.pop("runs")]
    return Recording(runs=tuple(runs), **document)


def find_recordings(folder: Path) -> list[Path]:
    """Return the recordings under ``folder``, one folder a card."""
    return sorted(folder.glob("*/*.json.gz"))


class PlacedAllocator(CachingAllocator):
    """The simulated allocator, its segments where the driver put them: of free blocks alike in size, the one at the lowest address serves.

    Attributes:
        place: address of the next new segment, ``None`` for one beyond all others.
    """

    place: int | None = None
    _beyond = 2**60

    def _new(self, pool: Pool, size: int) -> Block | None:
        if self.place is not None and all(block.address != self.place for block in self.blocks()):
            self._next_address = self.place
        else:
            self._next_address = self._beyond = self._beyond + 2**40
        return super()._new(pool, size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The bytes reserved after every request that the allocator answered: ``simulated`` by the replay, ``recorded`` by segments' events.

    Attributes:
        moved: the requests that a block at another address served; where segments can grow, addresses are not compared.
    """

    simulated: list[int]
    recorded: list[int]
    moved: list[int]

    @property
    def differs(self) -> int | None:
        """The first request after which the two are not the same, ``None`` where they always are."""
        return next((i for i, (one, other) in enumerate(zip(self.simulated, self.recorded, strict=True)) if one != other), None)


def replay_history(run: Run, settings: AllocatorSettings | None = None) -> Replay:
    """Return what the simulated allocator reserves when it is asked what the real one was asked, in the same order."""
    cards: dict[int, PlacedAllocator] = {}
    live: dict[tuple[int, int], Block | None] = {}
    replay = Replay(simulated=[], recorded=[], moved=[])
    classic = not (settings or AllocatorSettings()).expandable_segments
    for event, place, released, reserved in _requests(run.events):
        card = cards.setdefault(
            event.stream, PlacedAllocator(_UNLIMITED if run.cap is None else run.cap, settings, capped=run.cap is not None)
        )
        if released and run.cap is None:
            card.release_cached()  # without a cap nothing but the program itself gives the cache back
        where = event.stream, event.address
        if event.action == "free_completed":
            block = live.pop(where, None)
            if block is not None:
                card.free(block)
        else:
            card.place = place if classic else None
            block = _serve(card, event)
            if event.action == "alloc":
                live[where] = block
            if classic and block is not None and block.address != event.address * GRAIN:
                replay.moved.append(len(replay.simulated))
        replay.simulated.append(sum(card.reserved for card in cards.values()))
        replay.recorded.append(reserved)
    return replay


def _requests(events: Sequence[Event]) -> Iterator[tuple[Event, int | None, bool, int]]:
    """Yield each request with the address of the segment taken for it, whether any was given back before it, and the bytes reserved."""
    reserved, place, released = 0, None, False
    for event in events:
        reserved += event.size * ((event.action in _GROWS) - (event.action in _SHRINKS))
        released |= event.action in _SHRINKS
        place = event.address * GRAIN if event.action == "segment_alloc" else place
        if event.action in _ANSWERED:
            yield event, place, released, reserved
            place, released = None, False


def _serve(card: PlacedAllocator, event: Event) -> Block | None:
    """Ask for what was asked for; a block that the real allocator had no room for is given back at once."""
    try:
        block = card.malloc(event.size)
    except SimulatedOutOfMemory:
        return None
    if event.action == "oom":
        card.free(block)
        return None
    return block
