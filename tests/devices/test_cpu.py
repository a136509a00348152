"""Readings of real CPU memory: what the limit counts is what is read, in every phase and after whatever trial."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autobatch import Outcome, build_workload
from autobatch.core.units import KIB, MIB
from autobatch.devices.address_space import HighWater
from autobatch.devices.cpu import CpuDevice
from autobatch.probe.inline import InlineProber

ROW = 2 * MIB


def untouched(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """A step that asks for ``ROW`` bytes a row, as a workspace is asked for, and never writes to them."""
    workspace = torch.empty(len(batch), ROW // 4)
    return model(batch).sum() + 0 * len(workspace)


def inline(step: Any, budget: int = 256 * MIB) -> InlineProber:
    return InlineProber(build_workload(nn.Linear(1, 1), torch.ones(1, 1), step=step), CpuDevice(), memory_budget=budget, margin=0.0)


def peak_of(prober: InlineProber, size: int) -> int:
    probe = prober.probe(size, steps=2)
    assert probe.outcome is Outcome.FIT
    assert probe.peak_allocated is not None
    return probe.peak_allocated


def test_what_is_asked_for_and_never_touched_counts_in_the_reading_as_in_the_limit() -> None:
    prober = inline(untouched)
    try:
        base, more = peak_of(prober, 1), peak_of(prober, 101)
        assert more - base == pytest.approx(100 * ROW, abs=64 * KIB)
        assert prober.probe(130, steps=2).outcome is Outcome.OOM
    finally:
        prober.close()


def test_a_size_reads_alike_before_and_after_a_larger_one_and_one_that_failed() -> None:
    prober = inline(untouched)
    try:
        before = peak_of(prober, 20)
        assert peak_of(prober, 100) > before
        assert prober.probe(200, steps=2).outcome is Outcome.OOM
        assert peak_of(prober, 20) == pytest.approx(before, abs=256 * KIB)
    finally:
        prober.close()


def test_a_trial_gives_its_addresses_back() -> None:
    prober = inline(untouched)
    try:
        peak_of(prober, 10)
        before = _addresses()["VmSize"]
        peak_of(prober, 100)
        assert prober.probe(200, steps=2).outcome is Outcome.OOM
        assert _addresses()["VmSize"] - before < MIB
    finally:
        prober.close()


UNDER_A_LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (2**36, resource.RLIM_INFINITY))
from test_cpu import inline, peak_of, untouched
prober = inline(untouched)
small, large = peak_of(prober, 1), peak_of(prober, 100)
prober.close()
print(large - small, resource.getrlimit(resource.RLIMIT_AS)[0])
"""


def test_under_a_limit_of_the_users_own_it_is_what_was_resident() -> None:
    done = subprocess.run([sys.executable, "-c", UNDER_A_LIMIT], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    growth, limit = map(int, done.stdout.split())
    assert growth < 10 * ROW
    assert limit == 2**36


def test_the_mark_is_set_back_to_now_without_memory() -> None:
    torch.empty(64 * MIB // 4)

    def read() -> tuple[int, int]:
        now = _addresses()
        return now["VmSize"], now["VmPeak"]

    resident = _addresses()["VmRSS"]
    water = HighWater(read)
    try:
        assert water.reset()
        assert read()[0] == read()[1]
        assert _addresses()["VmRSS"] - resident < MIB
        seen = read()[1]
        block = torch.empty(48 * MIB // 4)
        del block
        assert read()[1] - seen == pytest.approx(48 * MIB, abs=64 * KIB)
    finally:
        water.lower()


def test_addresses_have_an_end() -> None:
    water = HighWater(lambda: (0, 2**45))
    assert not water.reset()
    assert water.laid_up == 0


def _addresses() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * KIB for line in lines if line.startswith(("VmSize", "VmPeak", "VmRSS"))}
