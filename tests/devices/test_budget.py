from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autobatch import DeviceUnavailable, InvalidRequest, MemoryReading
from autobatch.core.records import ProcessMemory, Setting
from autobatch.core.units import GIB, MIB
from autobatch.devices import device_names, device_type, open_device
from autobatch.devices.base import narrowed, set_budget
from autobatch.devices.cgroup import ControlGroup
from autobatch.devices.host import host_memory

READING = MemoryReading(capacity=24 * GIB, free=18 * GIB, held=2 * GIB, others=(ProcessMemory(pid=77, used=4 * GIB),))


@pytest.mark.parametrize(
    ("memory_budget", "budget"),
    [
        (None, 20 * GIB),
        (8 * GIB, 8 * GIB),
        ("8GiB", 8 * GIB),
        ("8 gib", 8 * GIB),
        (0.5, 12 * GIB),
        ("0.5", 12 * GIB),
        ("25%", 6 * GIB),
        (str(MIB), MIB),
    ],
)
def test_a_budget_is_bytes_text_or_a_fraction(memory_budget: Any, budget: int) -> None:
    assert set_budget(READING, memory_budget, 0.0) == (budget, budget, ())


def test_the_margin_is_bytes_of_the_budget() -> None:
    assert set_budget(READING, "10GiB", 0.05)[:2] == (10 * GIB, int(9.5 * GIB))


def test_a_budget_beyond_what_is_free_is_narrowed_and_the_holders_named() -> None:
    budget, cap, notes = set_budget(READING, 1.0, 0.0)
    assert budget == cap == 20 * GIB
    assert notes == ("the budget asked for, 24.00 GiB, was narrowed to the 20.00 GiB that can be had now; others hold the rest (pid 77)",)


@pytest.mark.parametrize(
    "memory_budget", [0, -1, 0.0, float("nan"), float("inf"), True, "nothing", "20GB", "-5GiB", "0GiB", [], "25GiB", "200%"]
)
def test_a_budget_that_cannot_be_meant_is_refused(memory_budget: Any) -> None:
    with pytest.raises(InvalidRequest):
        set_budget(READING, memory_budget, 0.05)


@pytest.mark.parametrize("margin", [-0.1, 1.0, 2, float("nan"), True, "5%"])
def test_a_margin_outside_its_range_is_refused(margin: Any) -> None:
    with pytest.raises(InvalidRequest, match="margin is .*; a fraction from 0 to below 1"):
        set_budget(READING, None, margin)


@given(
    st.integers(0, 2**40), st.integers(0, 2**40), st.integers(1, 2**40), st.floats(0, 0.99),
    st.one_of(st.none(), st.floats(0.001, 1.0)),
)  # fmt: skip
def test_the_cap_never_exceeds_what_can_be_had(free: int, held: int, capacity: int, margin: float, fraction: float | None) -> None:
    reading = MemoryReading(capacity=capacity, free=free, held=held)
    budget, cap, _ = set_budget(reading, fraction, margin)
    assert 0 <= cap <= budget <= min(capacity, free + held)


def group(root: Path, version: int, name: str, limit: str, used: int, cache: int) -> None:
    folder = root / name if version == 2 else root / "memory" / name
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    limit_file, usage_file, key = files[version]
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / usage_file).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{key} {cache}\n")


@pytest.mark.parametrize(("version", "line"), [(2, "0::/job/step"), (1, "4:memory:/job/step\n3:cpu:/other")])
def test_the_tightest_limit_of_the_container_counts(tmp_path: Path, version: int, line: str) -> None:
    proc = tmp_path / "cgroup"
    proc.write_text(line + "\n")
    group(tmp_path, version, "job/step", "max" if version == 2 else str(2**63 - 4096), 0, 0)
    group(tmp_path, version, "job", str(4 * GIB), 3 * GIB, GIB)
    found = ControlGroup.of_this_process(proc, tmp_path)
    assert found is not None
    assert (found.limit, found.free()) == (4 * GIB, 2 * GIB)


def test_a_containers_limit_below_the_machines_ram_is_the_capacity(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/job")
    group(tmp_path, 2, "job", str(3 * MIB), 2 * MIB, MIB // 2)
    reading = host_memory(ControlGroup.of_this_process(tmp_path / "cgroup", tmp_path))
    assert (reading.capacity, reading.free, reading.source) == (3 * MIB, 3 * MIB // 2, "cgroup")
    assert reading.notes == (f"the container's limit ({tmp_path / 'job'}) is below the machine's RAM",)


def test_a_containers_limit_above_the_machines_ram_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/job")
    group(tmp_path, 2, "job", str(2**59), 2 * MIB, 0)
    reading = host_memory(ControlGroup.of_this_process(tmp_path / "cgroup", tmp_path))
    assert (reading.capacity, reading.source) == (psutil.virtual_memory().total, "psutil")


def test_the_shells_limit_on_address_space_is_what_is_free() -> None:
    script = "from autobatch.devices.host import host_memory as read; now = read(); print(now.free, *now.notes[-1:], sep='\\n')"
    run = subprocess.run(["sh", "-c", 'ulimit -v 1048576 && exec "$0" -c "$1"', sys.executable, script], capture_output=True, text=True)
    free, note = run.stdout.splitlines()
    assert 0 < int(free) < GIB
    assert note == "the shell's limit on address space (ulimit -v) is below the free RAM"


def test_without_a_limit_there_is_no_group(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/\n")
    assert ControlGroup.of_this_process(tmp_path / "cgroup", tmp_path) is None
    assert ControlGroup.of_this_process(tmp_path / "missing", tmp_path) is None


@given(free=st.integers(0, 24 * GIB), budget=st.integers(1, 20 * GIB), margin=st.floats(0, 0.9))
def test_a_budget_is_narrowed_exactly_when_a_trial_could_no_longer_have_its_share(free: int, budget: int, margin: float) -> None:
    amount, cap, _ = set_budget(READING, float(max(2, budget)), margin)
    setting = Setting(device="cuda:0", device_description="", reading=READING, budget=amount, cap=cap, margin=margin)
    now = MemoryReading(capacity=24 * GIB, free=free)
    after = narrowed(setting, now)
    if free >= cap:
        assert after is None
        return
    assert after is not None
    assert (after.budget, after.reading) == (free, now)
    assert after.cap <= free
    assert after.cap < cap
    assert len(after.notes) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mps", r"cannot hold 'mps' memory to a limit yet\. Known devices: cuda, cpu\. .* mps, autobatch\.search\(run\) works"),
        ("gpu", r"'gpu' is no device\. Known here: cuda, cuda:0 and so on, cpu\."),
        (3.5, r"3\.5 is no device"),
    ],
)
def test_a_device_that_cannot_be_probed_on_is_told_with_what_can(name: Any, message: str) -> None:
    with pytest.raises(DeviceUnavailable, match=message):
        open_device(name)


def test_the_default_device_is_the_current_card_or_the_cpu() -> None:
    assert device_type() == ("cuda" if torch.cuda.is_available() else "cpu")
    assert device_names() == [*(f"cuda:{index}" for index in range(torch.cuda.device_count())), "cpu"]
    assert (device_type("cuda:99"), open_device(torch.device("cpu")).name) == ("cuda", "cpu")
