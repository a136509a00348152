"""The prober that runs trials in a child process, so that nothing a trial does can reach this one."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from autobatch.core.errors import DeviceUnavailable, InvalidRequest, WorkerFailed
from autobatch.core.record_json import from_plain
from autobatch.core.records import Outcome, Probe, Setting
from autobatch.probe import keeper, wire

# The first reply waits for torch to be imported and the model to be built, which large models take minutes for.
START_TIMEOUT = 600.0
PROBE_TIMEOUT = 600.0
# A worker that retires runs its clean-up, the workload's own included; one that takes longer than this is killed.
_RETIRE_TIMEOUT = 30.0
# Seconds in which a replacement for a worker that could go on is to be there.
_QUICK = 3.0
_TAIL_LINES, _TAIL_WIDTH = 40, 2000
_LONGEST_LINE = 4 * 2**20
_GRACE = 2.0
_CLEARING = 7.0  # more than the keeper takes at most for what a worker left


class WorkerProber:
    """Probes in a worker process that serves one probe after another; a fresh one replaces it after a probe that did not fit.

    On the CPU a fresh one replaces it after every probe: libraries keep memory of each size they have seen, which a training run at one
    size does not. Where opening the workload takes longer than a fork is worth, the worker serves on.

    Args:
        target: what to load in the worker, as text; or
        payload: the workload's arguments, pickled by cloudpickle.
        options: ``device``, ``memory_budget``, ``margin``, and what overrides the target.
        probe_timeout: seconds one probe may take before the worker is killed.
        time_limit: seconds for all probes but the confirming ones; once a size has fitted, a probe is stopped when they are over.
        stdout: where the user's own standard output goes, a file descriptor; ``None`` leaves it where it is.
        stderr: called with each line the worker writes to its standard error.

    Raises:
        AutobatchError: the worker could not open the workload; the same error as in this process.
    """

    def __init__(
        self,
        *,
        target: str | None = None,
        payload: bytes | None = None,
        options: Mapping[str, Any],
        probe_timeout: float = PROBE_TIMEOUT,
        time_limit: float | None = None,
        stdout: int | None = None,
        stderr: Callable[[str], object] | None = None,
    ) -> None:
        if os.name != "posix":  # pragma: no cover: another system
            raise DeviceUnavailable(
                f"A worker process needs POSIX pipes, which {sys.platform} has not. Probe in this process: find(…, isolate=False)."
            )
        if not probe_timeout > 0:
            raise InvalidRequest(f"probe_timeout is {probe_timeout!r}; give seconds above zero, for example 600.")
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        blank = {"device": None, "memory_budget": None, "margin": 0.05, "settled": None, "ran_before": False}
        self._source = {"target": target} if target is not None else {"payload": len(payload or b""), "path": sys.path}
        self._payload, self._options = payload or b"", {**blank, **options}
        self._timeout = probe_timeout
        self._start = functools.partial(_Worker, stdout, stderr or (lambda text: sys.stderr.write(text)))
        self._worker: _Worker | None = None
        self._reopening = 0.0  # seconds that the last replacement took
        self._fresh = False  # whether the worker has the workload open and every probe in it fitted
        self.setting: Setting = self._open()

    def probe(self, batch_size: int, *, steps: int = 3, confirm: bool = False) -> Probe:
        """Return what ``steps`` training steps of ``batch_size`` rows did in the worker.

        Raises:
            WorkloadFailed: the user's code raised; the error carries its traceback as text.
            WorkerFailed: the worker died, hung or closed its pipe.
        """
        if not self._fresh:
            self._open()
        worker = self._worker
        assert worker is not None
        request = {"op": "probe", "batch_size": batch_size, "steps": steps, "confirm": confirm}
        kills, seconds = _memory_kills(), self._timeout
        if self._deadline is not None and self._options["ran_before"] and not confirm:
            seconds = min(seconds, max(0.0, self._deadline - time.monotonic()))
        try:
            reply = worker.ask(request, b"", seconds, f"at batch size {batch_size}")
        except WorkerFailed as error:
            self.close()
            if worker.status == -signal.SIGKILL and _memory_kills() > kills:
                message = "the kernel killed the worker because the machine's memory ran out"
                return Probe(batch_size=batch_size, outcome=Outcome.HOST_OOM, confirmation=confirm, message=message)
            if isinstance(error, _Late) and seconds < self._timeout:
                message = "stopped when the time limit of the search was over"
                return Probe(batch_size=batch_size, outcome=Outcome.TIMEOUT, confirmation=confirm, message=message)
            raise error from None
        except BaseException:
            self.close()
            raise
        if "error" in reply:
            self.close()
            raise wire.error_from(reply["error"], batch_size)
        probe = from_plain(Probe, reply["probe"])
        if "setting" in reply:
            self.setting = from_plain(Setting, reply["setting"])
            self._options["settled"] = self.setting
        self._options["ran_before"] = self._options["ran_before"] or probe.outcome.fits
        self._fresh = probe.outcome.fits and not reply.get("worn", False) and not self._keeps_of_every_size()
        return probe

    def close(self) -> None:
        """End the worker and everything it started; a second call does nothing."""
        worker, self._worker, self._fresh = self._worker, None, False
        if worker is not None:
            worker.end(waits=sys.exc_info()[0] is None)

    def _keeps_of_every_size(self) -> bool:
        """Whether a worker that goes on would give other readings than a fresh one, which is to be had quickly."""
        return self.setting.device == "cpu" and self._reopening < _QUICK

    def _retire(self) -> None:
        """Have the worker make room for the next; one that cannot is replaced with everything that it forked from."""
        assert self._worker is not None
        try:
            self._worker.ask({"op": "retire"}, b"", _RETIRE_TIMEOUT, "while it was replaced")
        except WorkerFailed:
            self.close()
            self._worker = self._start()

    def _open(self) -> Setting:
        """Start a worker and return its setting; a later worker keeps the first one's cap."""
        began = time.monotonic()
        try:
            if self._worker is None:
                self._worker = self._start()
            else:
                self._retire()
            request = {"op": "open", "options": self._options, **self._source}
            reply = self._worker.ask(request, self._payload, START_TIMEOUT, "while loading the workload")
            if "error" in reply:
                raise wire.error_from(reply["error"], None)
            setting = from_plain(Setting, reply["setting"])
        except BaseException:
            self.close()
            raise
        self._fresh, self._reopening = True, time.monotonic() - began if self._options["settled"] else 0.0
        if self._options["settled"] is None:
            self._options["settled"] = setting
        return setting


class _Late(WorkerFailed):
    """There was no answer in time."""


class _Worker:
    """One child process, its two pipes and the tail of its standard error.

    Attributes:
        status: its exit status once it ended, negative for a signal; 0 before.
    """

    def __init__(self, stdout: int | None, stderr: Callable[[str], object]) -> None:
        self._mark = uuid.uuid4().hex
        try:
            self._process, self._requests, self._replies = keeper.launch(stdout, self._mark)
        except OSError as error:
            raise WorkerFailed(
                f"The worker process could not be started: {error}. Look for a limit on processes, files or memory."
            ) from error
        self.status = 0
        self._ended = False
        self._pass_on = stderr
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._reader = threading.Thread(target=self._forward, args=(self._process.stderr,), daemon=True)
        self._reader.start()

    def ask(self, request: Mapping[str, Any], payload: bytes, timeout: float, when: str) -> dict[str, Any]:
        """Return the worker's reply to ``request``.

        Raises:
            WorkerFailed: there was none within ``timeout`` seconds, or the worker ended.
        """
        deadline = time.monotonic() + timeout
        try:
            wire.send(self._requests, wire.encode(request) + payload, timeout)
            line = wire.receive(self._replies, max(0.0, deadline - time.monotonic()))
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            self.end()
            raise _Late(
                f"The worker gave no answer within {timeout:.0f} seconds {when} and was stopped. The step may hang (a lock, a data "
                "loader, a network call) or be that slow: run it once by hand, or allow more with --probe-timeout SECONDS.",
                stderr_tail=self.tail(),
            ) from None
        if not line.endswith(b"\n"):
            self.end(waits=True)
            raise WorkerFailed(f"The worker {self._how_it_ended()} {when}. {self._advice()}", stderr_tail=self.tail())
        try:
            return wire.reply(line)
        except ValueError:
            self.end()
            raise WorkerFailed(
                f"The worker sent what is no answer {when} and was stopped. The workload writes into file descriptors that are not "
                "its own.",
                stderr_tail=self.tail(),
            ) from None

    def end(self, *, waits: bool = False) -> None:
        """Close the pipes, stop the worker, and kill everything that it started; ``waits`` gives it a moment to end by itself."""
        if self._ended:
            return
        self._ended = True
        os.close(self._requests)
        try:
            if waits:
                self._wait()
            if self._process.poll() is None:
                self._process.terminate()  # the keeper kills the worker and collects what is left of it
                self._wait(_CLEARING)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self.status = self._process.wait()
            if self.status != 0:
                keeper.kill_marked(self._mark)
            self._reader.join(_GRACE)
            os.close(self._replies)
            if self._process.stderr is not None and not self._reader.is_alive():
                self._process.stderr.close()

    def _wait(self, seconds: float = _GRACE) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def tail(self) -> str:
        """Return the last lines of its standard error."""
        return "\n".join(self._tail)

    def _forward(self, stream: IO[bytes]) -> None:
        """Pass the worker's standard error on and keep its tail; reading must never stop, or the worker would block."""
        for raw in iter(functools.partial(stream.readline, _LONGEST_LINE), b""):
            line = raw.decode(errors="replace")
            self._tail.append(line.rstrip("\n")[:_TAIL_WIDTH])
            with contextlib.suppress(Exception):
                self._pass_on(line)

    def _how_it_ended(self) -> str:
        if self.status < 0:
            return f"was killed by {keeper.signal_name(-self.status)}"
        if self.status == wire.PIPE_LOST:
            return "lost its pipe to autobatch"
        return f"ended with exit code {self.status}"

    def _advice(self) -> str:
        if self.status == -signal.SIGKILL:
            return (
                "Something outside killed it: look for the kernel's out-of-memory killer (dmesg) or a job limit, and give --memory-budget."
            )
        if self.status in (-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP):
            return "The workload, a job limit or somebody sent it that signal: the last lines of its standard error are below."
        if self.status < 0:
            return "Native code crashed: run one step of the same batch size by hand; the last lines of its standard error are below."
        if self.status == wire.PIPE_LOST:
            return "The workload closed file descriptors that are not its own (os.closerange, a daemon library): leave those alone."
        return "The workload ended the process itself (sys.exit, os._exit): the last lines of its standard error are below."


def _memory_kills() -> int:
    """Return how many processes the kernel has killed for want of memory since it started."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:  # pragma: no cover: another system
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
