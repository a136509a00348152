"""Every fault of the table through the real command: its exit code, its one message, and nothing left over."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from fault_table import FAULTS, Fault

import autobatch

FAST = ("--device", "cpu", "--memory-budget", "64MiB", "--steps", "2", "--tolerance", "0.5")
ROOT = Path(autobatch.__file__).parents[1]
SHARED = Path("/dev/shm")


@dataclass(frozen=True)
class Ran:
    """What a command did and left behind."""

    code: int
    out: str
    err: str
    processes: list[str]
    files: list[str]


def marked(mark: str) -> list[str]:
    """Return the processes with ``mark`` in their environment that are there still after a moment."""
    deadline = time.monotonic() + 2
    while True:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("AUTOBATCH_FAULT") == mark:
                    found.append(f"{process.pid} {' '.join(process.cmdline())} ({process.status()})")
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def run(fault: Fault, folder: Path) -> Ran:
    """Run the command on ``fault`` with a home and a folder for temporary files of its own."""
    mark, home, temporary = uuid.uuid4().hex, folder / "home", folder / "tmp"
    for path in (home, temporary):
        path.mkdir()
    (folder / "train.py").write_text(fault.target)
    own = {"PYTHONPATH": str(ROOT), "HOME": str(home), "TMPDIR": str(temporary), "AUTOBATCH_FAULT": mark, "COLUMNS": "120"}
    own["TORCHINDUCTOR_CACHE_DIR"] = str(folder)  # torch makes this folder when it is loaded, and means it to stay
    environment = {key: value for key, value in {**os.environ, **own, **dict(fault.environment)}.items() if value is not None}
    most = () if fault.free else ("--max-batch-size", "8")
    command = [sys.executable, "-m", "autobatch", "probe", "train.py:build", *FAST, *most, *fault.options]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=-1, stderr=-1, stdin=subprocess.DEVNULL) as process:
        try:
            out, err = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = b"", b"the command did not end"
    left = marked(mark)
    return Ran(process.returncode, out.decode(), err.decode(errors="replace"), left, sorted(p.name for p in temporary.iterdir()))


@pytest.fixture(scope="session")
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ran]]:
    """Run the chosen faults, two at a time: loading torch takes each of them seconds."""
    chosen = [item.callspec.params["fault"] for item in request.session.items if "fault" in getattr(item, "fixturenames", ())]
    before = set(SHARED.glob("*"))
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda fault: run(fault, tmp_path_factory.mktemp("fault")), chosen))
    yield {fault.name: result for fault, result in zip(chosen, done, strict=True)}
    deadline = time.monotonic() + 3
    while (left := set(SHARED.glob("*")) - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == set()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_has_its_exit_code_and_message_and_leaves_nothing(fault: Fault, ran: dict[str, Ran]) -> None:
    result = ran[fault.name]
    assert (result.code, result.err[-2000:]) == (fault.code, result.err[-2000:])
    assert re.search(fault.says, result.err)
    assert (result.out == "") == (fault.code != 0)
    assert len(re.findall(r"^autobatch: [tT]he ", result.err, re.MULTILINE)) == (fault.code != 0)
    assert "autobatch/probe" not in result.err
    assert (result.processes, result.files) == ([], [])
