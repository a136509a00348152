"""What happens above the worker: a parent that ends, is interrupted, or is no ordinary parent."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fault_table import DAEMON, Fault

from autobatch import Outcome, WorkerFailed
from autobatch.probe import worker as module
from autobatch.probe.worker import WorkerProber

OPTIONS = {"device": "cpu", "memory_budget": "64MiB"}


def target(folder: Path, act: str = "pass", load: str = "pass") -> str:
    (folder / "train.py").write_text(Fault("", act, load).target)
    return f"{folder / 'train.py'}:build"


def prober(folder: Path, act: str = "pass", load: str = "pass", **more: Any) -> WorkerProber:
    return WorkerProber(target=target(folder, act, load), options=OPTIONS, **{"stdout": 2, "stderr": lambda _: None, **more})


def below(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def gone_within(processes: list[psutil.Process], seconds: float) -> bool:
    """Return whether they have ended; zombies have, whoever adopted them may take its time to collect them."""
    deadline = time.monotonic() + seconds
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def command(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A command whose step hangs from 4 rows on, with a daemon in a session of its own beside it."""
    arguments = ["probe", target(tmp_path, f"{DAEMON}; time.sleep(1000)"), "--device", "cpu", "--memory-budget", "64MiB"]
    with subprocess.Popen([sys.executable, "-m", "autobatch", *arguments], stderr=subprocess.PIPE, stdout=-1, text=True) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_nothing_outlives_a_parent_by_more_than_a_second(command: subprocess.Popen[str], number: int) -> None:
    assert command.stderr is not None
    while "fits" not in command.stderr.readline():
        assert command.poll() is None
    deadline = time.monotonic() + 30
    while len(started := below(command.pid)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    command.send_signal(number)
    assert command.wait() == -number
    assert gone_within(started, 1.0)


@pytest.mark.parametrize("seconds", [0.0, 0.8])
def test_a_parent_killed_while_its_worker_starts(command: subprocess.Popen[str], seconds: float) -> None:
    deadline = time.monotonic() + 30
    while not (started := below(command.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(seconds)
    command.kill()
    command.wait()
    assert gone_within(started, 1.0)


# After which line of standard error, and how many seconds and processes later.
MOMENTS = {
    "torch is being loaded": (None, 0.3, 1),
    "the workload is being loaded": (None, 0.0, 2),
    "the first trial": (r"^resident", 0.0, 2),
    "a later trial": (r"^batch size .* fits", 0.1, 2),
    "the confirmation": (r"^batch size .*\b8\b .* fits", 0.05, 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_at_any_moment_leaves_nothing_running(moment: str) -> None:
    line, seconds, processes = MOMENTS[moment]
    options = ["--device", "cpu", "--memory-budget", "1GiB", "--max-batch-size", "8"]
    arguments = [sys.executable, "-m", "autobatch", "probe", "example:gpt", *options]
    with subprocess.Popen(arguments, stdout=-1, stderr=-1, text=True) as command:
        assert command.stderr is not None
        while line and not re.search(line, command.stderr.readline()):
            assert command.poll() is None
        while len(started := below(command.pid)) < processes:
            assert command.poll() is None
            time.sleep(0.01)
        time.sleep(seconds)
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=30)
    assert (command.returncode, out) == (130, "")
    assert "autobatch: interrupted; the worker was stopped." in err
    assert "Traceback" not in err
    assert gone_within(started, 0)


def test_a_worker_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    made: list[WorkerProber] = []
    thread = threading.Thread(target=lambda: made.append(prober(tmp_path)))
    thread.start()
    thread.join()
    assert made[0].probe(2).outcome is Outcome.FIT
    made[0].close()


def test_a_parent_that_ignores_its_childrens_ends_and_blocks_signals(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        worker = prober(tmp_path, f"{DAEMON}; time.sleep(99)", probe_timeout=1.0)
        with pytest.raises(WorkerFailed, match="gave no answer within 1 seconds"):
            worker.probe(4)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGCHLD, before)


def test_what_shows_the_workers_output_may_fail(tmp_path: Path) -> None:
    def broken(text: str) -> None:
        raise RuntimeError(text)

    worker = prober(tmp_path, "os.write(2, b'x\\n' * 2**20)", stderr=broken)
    assert worker.probe(4).outcome is Outcome.FIT
    worker.close()


def test_loading_that_hangs_and_a_payload_that_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "START_TIMEOUT", 0.2)
    with pytest.raises(WorkerFailed, match="while loading the workload and was stopped"):
        WorkerProber(payload=bytes(2**20), options=OPTIONS, stdout=2)


@pytest.mark.parametrize("spare", [1, 3, 5])
def test_no_descriptors_left_for_a_worker(tmp_path: Path, spare: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(int(name) for name in os.listdir("/proc/self/fd"))
    taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(top)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1 + spare, limits[1]))
    try:
        with pytest.raises(WorkerFailed, match="could not be started: .*Too many open files"):
            prober(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)
