"""The format of recordings, and the simulated allocator held against every recording that is committed."""

from __future__ import annotations

import dataclasses
import gzip
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autobatch.core.units import GIB, KIB, MIB
from autobatch.simulate.allocator import SimulatedOutOfMemory
from autobatch.simulate.allocator_settings import AllocatorSettings
from autobatch.simulate.blocks import Block
from autobatch.simulate.cards import Card
from autobatch.simulate.prober import SimulatedProber
from autobatch.simulate.step import trace_for
from autobatch.workload.workload import build_workload
from benchmarks.recordings import PlacedAllocator, Recording, Replay, Run, events_from_torch, find_recordings, read, replay_history, write
from benchmarks.zoo import ZOO

COMMITTED = Path(__file__).parent.parent / "benchmarks" / "results" / "recordings"
BASE = 0x7F00_0000_0000
CARD = {"name": "a card of no make", "capability": [8, 6], "total": 24 * GIB, "alloc_conf": ""}


class Driver:
    """Asks an allocator at random and writes down what it does as torch would; new segments lie below or above the earlier ones."""

    def __init__(self, *, cap: int | None = None, conf: str = "", descending: bool = False) -> None:
        self.card = PlacedAllocator(2**62 if cap is None else cap, AllocatorSettings.parse(conf), capped=cap is not None)
        self._step = -(2**33) if descending else 2**33
        self.trace: list[dict[str, Any]] = []
        self.held: list[Block] = []
        self._segments: dict[int, int] = {}
        self._count = 0

    def malloc(self, size: int) -> None:
        self._count += 1
        self.card.place = BASE + self._count * self._step
        try:
            block = self.card.malloc(size)
        except SimulatedOutOfMemory:
            self._tell_segments()
            self.trace.append({"action": "oom", "device_free": 0, "size": size, "stream": 0})
            return
        self.held.append(block)
        self._tell_segments()
        self._tell("alloc", block.address, size)

    def free(self, index: int) -> None:
        block = self.held.pop(index)
        self._tell("free_requested", block.address, block.requested)
        self._tell("free_completed", block.address, block.requested)
        self.card.free(block)

    def empty_cache(self) -> None:
        self.card.release_cached()
        self._tell_segments()

    def _tell(self, action: str, address: int, size: int) -> None:
        self.trace.append({"action": action, "addr": address, "size": size, "stream": 0, "time_us": len(self.trace)})

    def _tell_segments(self) -> None:
        """Write down the segments that have gone and those that have come: whole chains of blocks."""
        now = {}
        for block in [*self.held, *self.card.blocks()]:
            while block.prev is not None:
                block = block.prev
            start, size = block.address, 0
            follow: Block | None = block
            while follow is not None:
                size, follow = size + follow.size, follow.next
            now[start] = size
        for start in self._segments.keys() - now.keys():
            self._tell("segment_free", start, self._segments[start])
        for start in now.keys() - self._segments.keys():
            self._tell("segment_alloc", start, now[start])
        self._segments = now


def driven(seed: int, count: int = 600, **how: Any) -> Driver:
    choose, driver = random.Random(seed), Driver(**how)
    sizes = (512, 3 * KIB, 200 * KIB, MIB, 2 * MIB + 512, 7 * MIB, 12 * MIB, 33 * MIB, 64 * MIB)
    for _ in range(count):
        if driver.held and choose.random() < 0.48:
            driver.free(choose.randrange(len(driver.held)))
        else:
            driver.malloc(choose.choice(sizes) + choose.randrange(2) * choose.randrange(4 * KIB))
    return driver


def recorded(driver: Driver, cap: int | None = None, **card: Any) -> Recording:
    peak = {"allocated": driver.card.peak_allocated, "requested": driver.card.peak_requested, "reserved": driver.card.peak_reserved}
    run = Run(batch_size=8, cap=cap, peaks={"forward_backward": peak}, retries=driver.card.retries, events=events_from_torch(driver.trace))
    return Recording(workload="mlp-fp32-sgd", scale=1, card={**CARD, **card}, runs=(run,))


def replayed(recording: Recording) -> list[Replay]:
    settings = AllocatorSettings.parse(recording.card["alloc_conf"])
    return [replay_history(run, settings) for run in recording.runs if run.events]


def check_replay(recording: Recording) -> None:
    """Hold the simulated allocator to the recorded one after every request."""
    for run, replay in zip([run for run in recording.runs if run.events], replayed(recording), strict=True):
        told = f"{recording.workload} on {recording.card['name']}, {run.batch_size} rows"
        assert replay.differs is None, f"{told}: request {replay.differs} of {len(replay.recorded)}; first moved: {replay.moved[:1]}"
        if run.outcome == "fit":
            assert max(replay.recorded) == max(peak["reserved"] for peak in run.peaks.values()), told


def errors(recording: Recording) -> list[float]:
    """Return by what share of the recorded peak the traced one is off, for each run on the whole card; below 0 is too little."""
    runs = [run for run in recording.runs if run.outcome == "fit" and run.cap is None]
    if not runs or "compiled" in recording.workload:
        return []
    capability = recording.card["capability"][0], recording.card["capability"][1]
    work = build_workload(**ZOO[recording.workload](recording.scale).arguments)
    name = str(recording.card["name"])
    card = Card(name=name, description=name, total=recording.card["total"], capability=capability, source="recorded")
    settings = AllocatorSettings.parse(recording.card["alloc_conf"])
    prober = SimulatedProber(work, trace_for(work, capability).trace, card, settings=settings, margin=0)
    return [(prober.probe(run.batch_size).peak_allocated or 0) / run.peak_allocated - 1 for run in runs]


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("conf", ["", "max_split_size_mb:32", "garbage_collection_threshold:0.6", "roundup_power2_divisions:4"])
@pytest.mark.parametrize("cap", [None, 400 * MIB])
def test_a_history_comes_back_from_its_file_and_replays_exactly(tmp_path: Path, cap: int | None, conf: str, descending: bool) -> None:
    actions = set()
    for seed in range(3):
        driver = driven(seed, cap=cap, conf=conf, descending=descending)
        recording = recorded(driver, cap, alloc_conf=conf)
        path = tmp_path / "a-card" / f"{seed}.json.gz"
        write(recording, path)
        assert read(path) == recording
        assert find_recordings(tmp_path)[seed] == path
        check_replay(recording)
        assert replayed(recording)[0].moved == []
        actions |= {event["action"] for event in driver.trace}
    assert ({"oom", "segment_free"} <= actions) == (cap is not None)


def test_the_cache_may_be_given_back_by_the_program() -> None:
    driver = driven(1)
    driver.empty_cache()
    driver.malloc(50 * MIB)
    recording = recorded(driver)
    assert "segment_free" in {event.action for event in recording.runs[0].events}
    check_replay(recording)


def test_segments_that_grow_replay_exactly() -> None:
    conf = "expandable_segments:True"
    card, trace = PlacedAllocator(settings=AllocatorSettings.parse(conf)), []
    held: list[tuple[Block, int, int]] = []
    choose, before = random.Random(0), 0
    for _ in range(300):
        if held and choose.random() < 0.45:
            block, key, size = held.pop(choose.randrange(len(held)))
            card.free(block)
            trace += [{"action": action, "addr": key, "size": size, "stream": 0} for action in ("free_requested", "free_completed")]
            continue
        size = choose.choice((600, 300 * KIB, 5 * MIB, 30 * MIB))
        block = card.malloc(size)
        if card.reserved > before:
            trace.append({"action": "segment_map", "addr": BASE + before, "size": card.reserved - before, "stream": 0})
            before = card.reserved
        key = BASE + 512 * len(trace)  # any place inside what is mapped: addresses are not compared here
        held.append((block, key, size))
        trace.append({"action": "alloc", "addr": key, "size": size, "stream": 0})
    peak = {"allocated": card.peak_allocated, "requested": card.peak_requested, "reserved": card.peak_reserved}
    run = Run(batch_size=8, peaks={"forward_backward": peak}, events=events_from_torch(trace))
    check_replay(Recording(workload="mlp-fp32-sgd", scale=1, card={**CARD, "alloc_conf": conf}, runs=(run,)))


def test_a_wrong_size_is_noticed() -> None:
    recording = recorded(driven(2))
    run = recording.runs[0]
    at = next(i for i, event in enumerate(run.events) if event.action == "alloc" and event.size > 60 * MIB)
    wrong = dataclasses.replace(run.events[at], size=run.events[at].size + 3 * MIB)
    changed = dataclasses.replace(run, events=(*run.events[:at], wrong, *run.events[at + 1 :]))
    with pytest.raises(AssertionError, match="mlp-fp32-sgd on a card of no make, 8 rows: request"):
        check_replay(dataclasses.replace(recording, runs=(changed,)))


def test_a_history_that_begins_late_is_refused() -> None:
    trace = driven(3).trace
    late = next(i for i, event in enumerate(trace) if event["action"] == "free_requested")
    with pytest.raises(ValueError, match="record from the first request on"):
        events_from_torch(trace[late:])


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.json.gz"
    path.write_bytes(gzip.compress(b'{"format": 0}'))
    with pytest.raises(ValueError, match="is of another format than 1"):
        read(path)


def test_a_step_recorded_from_its_trace_has_no_error() -> None:
    name = "gpt-bf16-adamw"
    work = build_workload(**ZOO[name](1).arguments)
    line = trace_for(work, (8, 6)).trace
    runs = []
    for rows in (7, 64):
        driver, sizes, held = Driver(), line.sizes(rows), {}
        driver.malloc(Card(name="", description="", total=GIB, capability=(8, 6), source="").workspace)
        for event in line.events:
            if event >= 0 and sizes[event]:
                driver.malloc(sizes[event])
                held[event] = driver.held[-1]
            elif event < 0 and sizes[~event]:
                driver.free(driver.held.index(held.pop(~event)))
        runs += [dataclasses.replace(recorded(driver).runs[0], batch_size=rows)]
    recording = Recording(workload=name, scale=1, card=CARD, runs=tuple(runs))
    check_replay(recording)
    assert errors(recording) == [0.0, 0.0]


def record_cuda(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script where no card is seen, whatever this machine has."""
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).parent.parent / "scripts" / "record_cuda"
    return subprocess.run([script, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_without_a_card_the_recorder_says_what_to_type_next(tmp_path: Path) -> None:
    ended = record_cuda("--only", "mlp", "--out", str(tmp_path), "--quick")
    assert ended.returncode == 3
    assert "record_cuda: torch.cuda.is_available() is false" in ended.stderr
    assert "PYTHON=path/to/python scripts/record_cuda --quick" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_not_in_the_zoo_is_answered_with_those_that_are() -> None:
    ended = record_cuda("--only", "perceptron")
    assert ended.returncode == 2
    assert "nothing in the zoo has 'perceptron' in its name. There are: plain_conv-fp32-sgd, " in ended.stderr


def test_committed_recordings_replay_exactly() -> None:
    for path in find_recordings(COMMITTED):
        check_replay(read(path))


def test_traces_come_near_the_committed_recordings_and_rarely_fall_short() -> None:
    off = [error for path in find_recordings(COMMITTED) for error in errors(read(path))]
    if off:
        assert statistics.median(abs(error) for error in off) <= 0.02
        assert sum(error < 0 for error in off) <= 0.05 * len(off)
