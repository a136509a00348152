"""The worker process: opens one workload, answers one probe after another, and ends with its parent.

Started as ``python -m autobatch.probe.child REQUEST_FD REPLY_FD``. The process started so loads torch and forks; the fork does the
work. When it is told to retire, after a probe that did not fit, the next fork takes its place without loading torch again. However else
it ends, the first process ends in the same way. Standard output and standard error stay the user's.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, TYPE_CHECKING, Any, NoReturn

from autobatch.probe import wire

if TYPE_CHECKING:
    from autobatch.probe.inline import InlineProber

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_RETIRED = 86  # exit code of a worker that made room for the next
# Frames of the machinery that called the user's code; their own traceback begins below them.
_OURS = tuple(str(Path(__file__).parents[1] / room) for room in ("probe", "workload", "devices"))


def serve(requests: IO[bytes], replies: IO[bytes]) -> int:
    """Answer requests until the parent closes its end or says to retire, and return the exit code."""
    prober: InlineProber | None = None
    with contextlib.ExitStack() as stack:
        for line in iter(requests.readline, b""):
            request = wire.decode(line)
            if request["op"] == "retire":
                replies.write(wire.encode({"retired": True}))
                replies.flush()
                return _RETIRED
            try:
                if request["op"] == "open":
                    prober = _open(request, requests)
                    stack.callback(prober.close)
                    reply: dict[str, Any] = {"setting": prober.setting}
                else:
                    assert prober is not None
                    probe = prober.probe(request["batch_size"], steps=request["steps"], confirm=request["confirm"])
                    reply = {"probe": probe}
            except Exception as error:  # noqa: BLE001 whatever the user's code raises is the answer
                reply = {"error": wire.error_to(error, users_traceback(error))}
            replies.write(wire.encode(reply))
            replies.flush()
    return 0


def users_traceback(error: BaseException) -> str:
    """Return the traceback of ``error`` as text, from the first frame that is the user's; empty when there is none."""
    below = error.__traceback__
    while below is not None and _is_ours(below):
        below = below.tb_next
    if below is None:
        return "" if isinstance(error, ValueError) else "".join(traceback.format_exception_only(error))
    return "".join(traceback.format_exception(type(error), error, below))


def _is_ours(entry: TracebackType) -> bool:
    frame: FrameType = entry.tb_frame
    return frame.f_code.co_filename.startswith((*_OURS, "<frozen importlib", importlib_file()))


def importlib_file() -> str:
    """Return the folder of the import machinery, whose frames say nothing about the user's code."""
    import importlib

    return str(Path(importlib.__file__).parent)


def _open(request: Mapping[str, Any], requests: IO[bytes]) -> InlineProber:
    options = request["options"]
    from autobatch.devices import open_device
    from autobatch.probe.inline import InlineProber
    from autobatch.simulate.foresight import foresee

    device = open_device(options["device"])
    workload, defaults = _workload(request, requests)
    first = options["cap"] is None
    expected, note = foresee(workload, device.capability) if first else ((), "")
    return InlineProber(
        workload,
        device,
        memory_budget=options["memory_budget"],
        margin=options["margin"],
        cap=options["cap"],
        keep_state=False,
        ran_before=options["ran_before"],
        defaults=defaults,
        expected=expected,
        notes=(note,) if note else (),
    )


def _workload(request: Mapping[str, Any], requests: IO[bytes]) -> tuple[Any, dict[str, Any]]:
    if "target" in request:
        from autobatch.workload.target import load_target

        return load_target(request["target"], request["options"])
    import cloudpickle

    from autobatch.workload.workload import build_workload

    arguments = cloudpickle.loads(requests.read(request["payload"]))
    return build_workload(**arguments), {}


def _control(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value)


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its ``parent`` ends, however that ends."""
    _control(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _load_torch() -> None:
    """Load what every worker needs, with the allocator set before torch takes its first block: readings on the CPU depend on it."""
    from autobatch.devices.allocator import exact_allocator

    exact_allocator()
    import torch._dynamo  # what the first optimizer of a process loads  # noqa: F401


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


def _clear_away() -> None:
    """Kill what a worker that ended has left running: data loaders, helpers."""
    import psutil

    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=2)


def main() -> None:
    """Keep one worker after another serving the two descriptors named on the command line."""
    _die_with(os.getppid())
    _control(_PR_SET_CHILD_SUBREAPER, 1)
    descriptors = int(sys.argv[1]), int(sys.argv[2])
    for fd in descriptors:
        os.set_inheritable(fd, False)
    _load_torch()
    keeper = os.getpid()
    while (worker := os.fork()) != 0:
        signal.signal(signal.SIGTERM, functools.partial(_kill, worker))
        _, status = os.waitpid(worker, 0)
        _clear_away()
        if os.waitstatus_to_exitcode(status) != _RETIRED:
            _end_like(status)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with(keeper)
    with open(descriptors[0], "rb") as requests, open(descriptors[1], "wb") as replies:
        code = serve(requests, replies)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # somebody waits: skip the interpreter's long goodbye


if __name__ == "__main__":
    main()
