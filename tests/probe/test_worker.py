"""The worker process: real child processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import autobatch
from autobatch import DeviceUnavailable, InvalidRequest, Outcome, WorkerFailed, WorkloadFailed
from autobatch.core.options import PlanRequest, SearchOptions
from autobatch.loop import Run
from autobatch.probe import preload, wire
from autobatch.probe.keeper import kill_marked
from autobatch.probe.worker import WorkerProber

TARGETS = """
import asyncio, atexit, json, os, signal, subprocess, sys, time
import torch
from torch import nn

if "coverage" in sys.modules:  # it ends with the clean-up that a worker runs before it ends: what comes then is to be counted too
    atexit.unregister(sys.modules["coverage"].Coverage.current()._atexit)

class Step(nn.Module):
    def __init__(self, act=None, at=4):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(262144))
        self.act, self.at = act, at
    def forward(self, x):
        if self.act is not None and len(x) >= self.at:
            self.act()
        return (x * self.weight).square().mean()

def options(act=None):
    return {"model": Step(act), "sample": torch.ones(1, 1), "step": lambda net, batch: net(batch), "optimizer": torch.optim.SGD}

def plain(): return options()
def slow(): time.sleep(3.1); return options()
def killed(): return options(lambda: os.kill(os.getpid(), signal.SIGKILL))
def crashed(): return options(lambda: os.abort())
def exits(): return options(lambda: os._exit(1))
def leaves(): return options(lambda: sys.exit(3))
def hangs(): return options(lambda: time.sleep(1000))
def raises(): return options(lambda: {}["missing"])
def loud():
    os.write(1, b'{"probe": {"batch_size": 1}}\\n' * 40000)
    os.write(2, b"x" * 1024 * 1024 + b"\\n")
    return options(lambda: print(json.dumps({"setting": None}), flush=True))
def parent():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    return options()
KEPT = []
def leaks(): return {**options(), "step": lambda net, batch: (KEPT.append(torch.ones(2**21)), net(batch))[1]}
WORKER = os.getpid()
def at_import(): raise OSError("no disk")
def ends(): sys.exit(7)
def cancelled():
    def act(): raise asyncio.CancelledError("no more")
    return options(act)
def library():
    print("known" if "sklearn.datasets" in sys.modules else "new", flush=True)
    import sklearn.datasets
    return options()
def vector(): return {**options(), "step": lambda net, batch: net(batch).repeat(3)}
def rude():
    atexit.register(os._exit, 5)
    return options()
def last_words():
    atexit.register(print, "and goodbye")
    return options(lambda: sys.stdout.write("last words "))
def shares():
    torch.multiprocessing.set_sharing_strategy("file_system")
    KEPT.append(torch.ones(4096).share_memory_())
    return options()
"""


@pytest.fixture
def target(tmp_path: Path) -> str:
    (tmp_path / "targets.py").write_text(TARGETS)
    return str(tmp_path / "targets.py")


def workers() -> list[int]:
    """Return the process numbers below this one: the one that loaded torch, then the one that probes."""
    return [child.pid for child in psutil.Process().children(recursive=True)]


def prober(target: str, **arguments: Any) -> WorkerProber:
    options = {"device": "cpu", "memory_budget": "64MiB"}
    return WorkerProber(target=target, options=options, **{"stdout": 2, "stderr": lambda _: None, **arguments})


def test_every_probe_on_the_cpu_has_a_fresh_worker_of_one_keeper_and_reads_alike_after_whatever(target: str) -> None:
    worker = prober(f"{target}:plain")
    try:
        assert worker.setting.budget == 64 * 2**20
        keeper, first = workers()
        alone = worker.probe(4)
        assert workers() == [keeper, first]
        assert [worker.probe(size).outcome for size in (1, 8, 500)] == [Outcome.FIT, Outcome.FIT, Outcome.OOM]
        after = worker.probe(4)
        assert workers()[0] == keeper
        assert workers()[1] != first
        assert after.peak_allocated == pytest.approx(alone.peak_allocated, abs=64 * 2**10)
    finally:
        worker.close()


def test_a_library_is_imported_twice_and_then_no_more(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    worker = prober(f"{target}:library", stdout=None)
    try:
        assert [worker.probe(size).outcome for size in (1, 2, 3)] == [Outcome.FIT] * 3
    finally:
        worker.close()
    assert capfd.readouterr().out.split() == ["new", "known", "known"]


def test_only_what_is_installed_is_imported_ahead_and_what_cannot_be_is_left() -> None:
    before = set(sys.modules)
    assert preload.imported_since(before) == b""
    assert preload.imported_since(before - {"psutil", "json", __name__}) == b"psutil"  # not what comes with Python or is the user's own
    script = """
import sys, torch
from autobatch.probe import preload
preload.load(b"no.such.module\\npluggy")
print("pluggy" in sys.modules, torch.get_num_threads() == int(sys.argv[1]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path(autobatch.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script, "2"], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["True", "True"]


def test_a_workload_that_takes_long_to_open_is_opened_again_after_failures_alone(target: str) -> None:
    worker = prober(f"{target}:slow")
    try:
        assert worker.probe(1).outcome is Outcome.FIT
        assert worker.probe(2).outcome is Outcome.FIT  # in the second worker, which was a long time coming
        _, second = workers()
        assert worker.probe(3).outcome is Outcome.FIT
        assert workers()[1] == second
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("killed", r"The worker was killed by SIGKILL at batch size 4\. Something outside killed it"),
        ("crashed", r"The worker was killed by SIGABRT at batch size 4\. Native code crashed"),
        ("exits", r"The worker ended with exit code 1 at batch size 4\. The workload ended the process itself"),
        ("leaves", r"The worker ended with exit code 3 at batch size 4"),
    ],
)
def test_a_worker_that_dies_is_named_with_the_batch_size(target: str, name: str, message: str) -> None:
    worker = prober(f"{target}:{name}")
    assert worker.probe(3).outcome is Outcome.FIT
    with pytest.raises(WorkerFailed, match=message):
        worker.probe(4)


def test_a_worker_that_hangs_is_stopped_at_its_deadline(target: str) -> None:
    worker = prober(f"{target}:hangs", probe_timeout=1.0)
    started = time.monotonic()
    with pytest.raises(WorkerFailed, match=r"gave no answer within 1 seconds at batch size 4 and was stopped\. The step may hang"):
        worker.probe(4)
    assert time.monotonic() - started >= 1.0


def test_the_users_error_keeps_the_users_traceback(target: str) -> None:
    worker = prober(f"{target}:raises")
    with pytest.raises(WorkloadFailed, match="KeyError: 'missing'") as caught:
        worker.probe(4)
    assert caught.value.batch_size == 4
    assert caught.value.traceback_text.startswith("Traceback (most recent call last):\n")
    assert "autobatch/probe" not in caught.value.traceback_text
    assert 'def raises(): return options(lambda: {}["missing"])' in caught.value.traceback_text


def test_what_the_user_prints_is_never_taken_for_an_answer(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    tail: list[str] = []
    worker = prober(f"{target}:loud", stderr=tail.append)
    try:
        assert worker.probe(4).outcome is Outcome.FIT
    finally:
        worker.close()
    assert capfd.readouterr().err.count('{"setting": null}') >= 3
    assert max(len(line) for line in tail) > 1024 * 1024


def test_processes_the_workload_started_go_with_the_worker(target: str) -> None:
    worker = prober(f"{target}:parent")
    assert len(workers()) == 3
    assert worker.probe(500).outcome is Outcome.OOM
    assert worker.probe(1).outcome is Outcome.FIT
    assert len(workers()) == 3  # the first worker's process went with it, the second one started its own
    worker.close()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("at_import", WorkloadFailed, "OSError: no disk"),
        ("nowhere", InvalidRequest, "has no function 'nowhere'"),
        ("ends", WorkerFailed, "ended with exit code 7 while loading the workload"),
    ],
)
def test_a_target_that_cannot_be_opened(target: str, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prober(f"{target}:{name}")


def test_a_device_that_is_not_there_is_the_same_error_as_in_this_process(target: str) -> None:
    with pytest.raises(DeviceUnavailable):
        WorkerProber(target=f"{target}:plain", options={"device": "cuda:99"}, stdout=2)


def test_an_interrupt_stops_the_worker(target: str) -> None:
    worker = prober(f"{target}:hangs")
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        worker.probe(4)
    timer.join()


def test_the_worker_dies_with_its_parent(target: str) -> None:
    script = (
        "import os, sys\nfrom autobatch.probe.worker import WorkerProber\n"
        f"worker = WorkerProber(target={target + ':hangs'!r}, options={{'device': 'cpu', 'memory_budget': '64MiB'}})\n"
        "print(worker._worker._process.pid, flush=True)\n"
        "worker.probe(4)\n"
    )
    import subprocess
    import sys

    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
        parent.wait()
        assert psutil.wait_procs([child], timeout=5)[1] == []


def test_find_isolates_models_that_cannot_be_imported() -> None:
    class Local(nn.Module):
        """Defined inside a function, as in a notebook."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(1024, 1024), nn.BatchNorm1d(1024))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    model = Local()
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    plan = autobatch.find(
        model,
        torch.ones(4, 1024),
        step=lambda net, batch: net(batch).square().mean(),
        optimizer=optimizer,
        device="cpu",
        memory_budget="64MiB",
        max_batch_size=64,
        isolate=True,
    )
    assert (plan.batch_size, plan.limited_by, plan.device) == (64, "max_batch_size", "cpu")
    assert {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()} == before
    assert optimizer.state == {}


def test_a_script_finds_its_neighbours_in_the_worker(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "models.py").write_text("import torch\nclass Net(torch.nn.Linear):\n    pass\n")
    (folder / "train.py").write_text(
        "import torch, autobatch\nfrom models import Net\n"
        "plan = autobatch.find(Net(4, 1), torch.ones(1, 4), max_batch_size=2, memory_budget='64MiB', device='cpu')\n"
        "print(plan.batch_size)\n"
    )
    run = subprocess.run([sys.executable, "project/train.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "2\n"), run.stderr


def test_a_worker_that_keeps_what_a_trial_left_is_replaced(target: str) -> None:
    worker = prober(f"{target}:leaks")
    try:
        (_, first), told = workers(), worker.probe(2)
        assert told.outcome is Outcome.FIT
        assert told.notes[0].startswith("a trial left ")
        assert worker.probe(2).outcome is Outcome.FIT
        assert workers()[1] != first
    finally:
        worker.close()


NEIGHBOUR = "import psutil, sys; taken = b'x' * (psutil.virtual_memory().available // 8); print(flush=True); sys.stdin.read()"


def test_a_neighbour_that_came_during_the_search_narrows_the_limit_for_good(target: str) -> None:
    worker = WorkerProber(target=f"{target}:plain", options={"device": "cpu", "margin": 0.01}, stdout=2, stderr=lambda _: None)
    command = [sys.executable, "-c", NEIGHBOUR]
    try:
        before = worker.setting
        assert worker.probe(2).outcome is Outcome.FIT
        assert worker.setting == before
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as neighbour:
            assert neighbour.stdout is not None
            neighbour.stdout.readline()
            confirmed = worker.probe(2, confirm=True)
        assert (confirmed.outcome, confirmed.confirmation) == (Outcome.FIT, True)
        after = worker.setting
        assert after.cap < 0.95 * before.cap
        assert after.budget == after.reading.obtainable
        assert after.notes[-1].startswith("during the search the memory that can be had fell from ")
    finally:
        worker.close()


def test_a_time_limit_ends_a_probe_under_way_and_returns_what_was_proven(target: str) -> None:
    worker = prober(f"{target}:hangs", time_limit=12.0)
    try:
        plan = Run(worker, PlanRequest(), SearchOptions(time_limit=12.0)).plan()
    finally:
        worker.close()
    stopped = [probe for probe in plan.probes if probe.outcome is Outcome.TIMEOUT]
    assert [(probe.message, probe.batch_size >= 4) for probe in stopped] == [("stopped when the time limit of the search was over", True)]
    assert 1 <= plan.batch_size < 4
    assert (plan.limited_by, plan.probes[-1].confirmation, plan.probes[-1].outcome) == ("time_limit", True, Outcome.FIT)


def test_an_exception_that_is_no_error_ends_the_worker_and_is_shown(target: str) -> None:
    worker = prober(f"{target}:cancelled")
    with pytest.raises(WorkerFailed, match=r"ended with exit code 1 at batch size 4\. The workload ended the process itself") as caught:
        worker.probe(4)
    assert caught.value.stderr_tail.endswith("CancelledError: no more")


def test_a_step_that_returns_no_loss_is_told_in_one_line(target: str) -> None:
    worker = prober(f"{target}:vector")
    with pytest.raises(WorkloadFailed, match=r"step returned a tensor of shape \(3,\); a scalar is wanted") as caught:
        worker.probe(1)
    assert caught.value.traceback_text.splitlines()[0] == f"autobatch.core.errors.WorkloadFailed: {caught.value}"


def test_a_worker_whose_clean_up_ends_it_is_replaced_with_what_it_was_forked_from(target: str) -> None:
    worker = prober(f"{target}:rude")
    try:
        keeper, _ = workers()
        assert worker.probe(500).outcome is Outcome.OOM
        assert worker.probe(2).outcome is Outcome.FIT
        assert workers()[0] != keeper
    finally:
        worker.close()


def test_a_worker_that_is_killed_between_two_probes_is_named(target: str) -> None:
    worker = prober(f"{target}:slow")
    assert [worker.probe(size).outcome for size in (1, 2)] == [Outcome.FIT] * 2
    keeper, child = (psutil.Process(pid) for pid in workers())
    keeper.kill()
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with pytest.raises(WorkerFailed, match=r"The worker was killed by SIGKILL at batch size 3\. Something outside killed it"):
        worker.probe(3)


def test_what_a_workload_says_last_is_written(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    worker = prober(f"{target}:last_words")
    assert worker.probe(4, steps=1).outcome is Outcome.FIT
    worker.close()
    assert capfd.readouterr().err.endswith("last words and goodbye\n")


def test_sockets_of_shared_memory_go_with_the_worker(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    worker = prober(f"{target}:shares")
    (first,) = tmp_path.glob("torch-shm-dir-*")
    assert worker.probe(500).outcome is Outcome.OOM
    assert worker.probe(1).outcome is Outcome.FIT
    assert not first.exists()
    worker.close()
    assert list(tmp_path.glob("torch-shm-dir-*")) == []


def test_processes_below_a_keeper_that_is_gone_are_found_by_its_mark() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(1000)"]
    mine, other = (subprocess.Popen(command, env={**os.environ, "AUTOBATCH_WORKER": mark}) for mark in ("mine", "other"))
    try:
        kill_marked("mine", seconds=0)
        assert mine.poll() is None
        kill_marked("mine")
        assert mine.wait() == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("line", [b"42\n", b"{}\n", b'{"probe": 1', b"\xff\n"])
def test_a_line_that_is_no_answer_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError):
        wire.reply(line)


class Locked(Exception):
    """Cannot be sent: a lock stays in its process."""

    def __init__(self) -> None:
        super().__init__("still locked")
        self.lock = threading.Lock()


class Unmade(Exception):
    """Can be sent, and not be made again."""

    def __reduce__(self) -> Any:
        return getattr, (None, "nowhere")


@pytest.mark.parametrize(
    ("error", "message", "original"),
    [
        (KeyError("missing"), "KeyError: 'missing'", KeyError),
        (Locked(), "Locked: still locked", type(None)),
        (Unmade("once"), "Unmade: once", type(None)),
        (KeyboardInterrupt(), "KeyboardInterrupt: ", type(None)),
        (WorkloadFailed("no loss"), "no loss", type(None)),
    ],
)
def test_an_error_arrives_as_what_it_said_and_where_possible_as_itself(error: BaseException, message: str, original: type) -> None:
    arrived = wire.error_from(wire.decode(wire.encode(wire.error_to(error))), 3)
    assert isinstance(arrived, WorkloadFailed)
    assert (str(arrived), arrived.batch_size, type(arrived.original)) == (message, 3, original)


def test_seconds_for_a_probe_are_above_zero(target: str) -> None:
    with pytest.raises(InvalidRequest, match="probe_timeout is 0; give seconds above zero"):
        prober(f"{target}:plain", probe_timeout=0)
