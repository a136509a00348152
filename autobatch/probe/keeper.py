"""The first process of a worker: forks one worker after another, watches over its own parent, and clears away what a worker leaves.

It forks without loading torch again, and alone knows every process below it: it is the one that they are given to when their own parent
ends, daemons in sessions of their own included.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from autobatch.probe import preload

if TYPE_CHECKING:
    import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# Seconds that processes get which remove shared memory once their clients have ended (torch's waits two), and that all get to be gone.
_CARETAKERS_MAY, _KILLED_MAY = 3.0, 5.0
# In the environment of a keeper and of everything below it.
_MARK = "AUTOBATCH_WORKER"
# What a worker says that makes room for the next.
MAKES_ROOM = b"r"
_CARETAKERS = ("torch_shm_manager", "resource_tracker")
# Folders for the sockets through which torch and multiprocessing pass tensors: they outlive a process that is killed.
_SOCKET_FOLDERS = ("pymp-", "torch-shm-dir-")


def launch(stdout: int | None, mark: str) -> tuple[subprocess.Popen[bytes], int, int]:
    """Start a keeper; return it with the descriptors to write requests to, which never waits, and to read replies from."""
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        request_read, request_write = os.pipe()
        theirs.callback(os.close, request_read)
        ours.callback(os.close, request_write)
        reply_read, reply_write = os.pipe()
        theirs.callback(os.close, reply_write)
        ours.callback(os.close, reply_read)
        os.set_blocking(request_write, False)
        # Opened here: a Popen that runs out of descriptors would leave its own one open.
        nothing = os.open(os.devnull, os.O_RDONLY)
        theirs.callback(os.close, nothing)
        process = subprocess.Popen(
            [sys.executable, "-m", "autobatch.probe.child", str(request_read), str(reply_write), str(os.getpid())],
            stdin=nothing,
            stdout=stdout,
            stderr=subprocess.PIPE,
            pass_fds=(request_read, reply_write),
            start_new_session=True,
            env={**_environment(), _MARK: mark},
        )
        ours.pop_all()
    return process, request_write, reply_read


def kill_marked(mark: str, seconds: float = 2.0) -> None:
    """Kill what was started below a keeper that is gone: the workload may have killed it, and then nothing else leads there."""
    import psutil

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = False
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                    process.kill()
                    found = True
        if not found:
            return
        time.sleep(0.01)


def signal_name(number: int) -> str:
    """Return how a signal is called; real-time signals have only numbers."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def prepare(parent: int) -> None:
    """Make this process a keeper that ends with ``parent``: signals as they are by default, and everything below it its own."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent that ignores its children's ends passes that on, and waitpid would fail
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    _control(_PR_SET_CHILD_SUBREAPER, 1)
    die_with(parent)


def _environment() -> dict[str, str]:
    """Return this process's environment with this package importable in the worker."""
    root = str(Path(__file__).parents[2])
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": root if not path else f"{root}{os.pathsep}{path}"}


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its ``parent`` ends, however that ends."""
    _control(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def keep(work: Callable[[int], NoReturn]) -> NoReturn:
    """Fork one worker after another to do ``work``, which is given the descriptor on which to say that it makes room for the next.

    It says ``MAKES_ROOM`` and the names of modules that the next one will import too.
    When a worker ends without having said so, or the parent ends, this process ends too, as the worker did.
    """
    keeper, parent = os.getpid(), os.getppid()
    # The kernel's signal would come when the thread ends that started this process, and would leave what only the keeper can clear away.
    _control(_PR_SET_PDEATHSIG, 0)
    while True:
        heard, says = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        worker = os.fork()
        signal.signal(signal.SIGTERM, functools.partial(_kill, worker) if worker else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        if worker == 0:
            _begin(work, keeper, heard, says)
        os.close(says)
        status = _wait(worker, parent)
        clear_away()
        said = _said(heard)
        if not said.startswith(MAKES_ROOM) or os.getppid() != parent:
            _end_like(status)
        preload.load(said.removeprefix(MAKES_ROOM))


def _begin(work: Callable[[int], NoReturn], keeper: int, heard: int, says: int) -> NoReturn:
    os.close(heard)
    die_with(keeper)
    work(says)


def clear_away() -> None:
    """Kill what a worker that ended has left running (data loaders, helpers, daemons) and remove their sockets' folders."""
    import psutil

    me, started, folders = psutil.Process(), time.monotonic(), set[Path]()
    while (left := me.children(recursive=True)) and time.monotonic() < started + _KILLED_MAY:
        patient = time.monotonic() < started + _CARETAKERS_MAY
        for process in left:
            with contextlib.suppress(psutil.Error, OSError):
                folders |= socket_folders(process)
                if not (patient and _is_caretaker(process)):
                    process.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)
    remove(folders)


def _is_caretaker(process: psutil.Process) -> bool:
    return any(name in " ".join(process.cmdline()) for name in _CARETAKERS)


def remove(folders: set[Path]) -> None:
    """Remove ``folders`` as far as that is possible."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def socket_folders(process: psutil.Process) -> set[Path]:
    """Return the folders that ``process`` made for its sockets, and that nobody removes when it is killed."""
    connections = getattr(process, "net_connections", None) or process.connections
    paths = [Path(str(connection.laddr)).parent for connection in connections("unix") if connection.laddr]
    return {path for path in paths if path.name.startswith(_SOCKET_FOLDERS)}


def _wait(worker: int, parent: int) -> int:
    """Return the status that ``worker`` ended with; kill it when the ``parent`` ends."""
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for pid in (worker, parent):
            with contextlib.suppress(OSError, AttributeError):  # old kernels and other systems have no such descriptors
                descriptor = os.pidfd_open(pid)
                stack.callback(os.close, descriptor)
                selector.register(descriptor, selectors.EVENT_READ)
        pause = 1.0 if len(selector.get_map()) == 2 else 0.05
        while True:
            if os.getppid() != parent:
                _kill(worker)
            ended, status = os.waitpid(worker, os.WNOHANG)
            if ended:
                return status
            selector.select(pause)


def _said(heard: int) -> bytes:
    """Return what the worker has said, whatever else holds the other end of ``heard`` still."""
    os.set_blocking(heard, False)
    with contextlib.closing(open(heard, "rb", buffering=0)) as pipe:
        return pipe.read(2**16) or b""


def _end_like(status: int) -> NoReturn:
    """End this process with the exit code, or by the signal, that ended its worker."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _kill(worker: int, *_: object) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)


def _control(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value)
