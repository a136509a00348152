"""Two searches on one card wait for each other; real processes hold and wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autobatch.core.errors import DeviceUnavailable
from autobatch.devices.lock import card_lock

HOLD = """
import sys, time
from pathlib import Path
from autobatch.devices.lock import card_lock
with card_lock("GPU-1", "cuda:0", folder=Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holding(folder: Path, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_free_card_is_held_at_once_and_nothing_is_said(tmp_path: Path) -> None:
    with card_lock("GPU-1", "cuda:0", folder=tmp_path) as note, card_lock("GPU-2", "cuda:1", folder=tmp_path) as other:
        assert (note, other) == ("", "")
        assert (tmp_path / "autobatch-GPU-1.holder").read_text().startswith(f"pid {os.getpid()} (")
    assert not list(tmp_path.glob("*.holder"))


def test_a_search_waits_for_another_and_says_for_whom(tmp_path: Path) -> None:
    with holding(tmp_path, 0.5) as process, card_lock("GPU-1", "cuda:0", folder=tmp_path) as note:
        assert f"for pid {process.pid} (-c) to end its search on cuda:0" in note


def test_a_search_that_waits_too_long_names_the_holder(tmp_path: Path) -> None:
    with holding(tmp_path, 100) as process:
        with pytest.raises(DeviceUnavailable, match=rf"cuda:0 is being searched by pid {process.pid} \(-c\); waited 0.2 s for it."):
            card_lock("GPU-1", "cuda:0", wait=0.2, folder=tmp_path).__enter__()
        process.kill()


def test_a_holder_that_is_killed_holds_no_longer(tmp_path: Path) -> None:
    with holding(tmp_path, 100) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        began = time.monotonic()
        with card_lock("GPU-1", "cuda:0", folder=tmp_path):
            pass
        assert time.monotonic() - began < 30  # a hang, not a speed


def test_where_no_lock_can_be_had_the_search_goes_on_and_says_so(tmp_path: Path) -> None:
    with card_lock("GPU-1", "cuda:0", folder=tmp_path / "nowhere" / "deeper" / ("x" * 300)) as note:
        assert note.startswith("no lock on cuda:0 (")
        assert note.endswith("another search on it at the same time would go unnoticed")
