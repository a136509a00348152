"""The worker process: opens one workload, answers one probe after another, and ends with its parent.

Started as ``python -m autobatch.probe.child REQUEST_FD REPLY_FD PARENT``. The process started so loads torch and forks; the fork does the
work. When it is told to retire, after a probe that did not fit, the next fork takes its place without loading torch again. However else
it ends, the first process (``keeper.py``) ends in the same way. Standard output and standard error stay the user's.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, TYPE_CHECKING, Any, NoReturn

from autobatch.core.record_json import from_plain
from autobatch.core.records import Setting
from autobatch.probe import keeper, preload, wire

if TYPE_CHECKING:
    from autobatch.probe.inline import InlineProber

# Frames of the machinery that called the user's code; their own traceback begins below them.
_OURS = tuple(str(Path(__file__).parents[1] / room) for room in ("probe", "workload", "devices"))


def serve(requests: IO[bytes], replies: IO[bytes]) -> bool:
    """Answer requests until the parent closes its end, or says to retire; return whether it said so."""
    prober: InlineProber | None = None
    served_by = os.getpid()
    with contextlib.ExitStack() as stack:
        for line in iter(requests.readline, b""):
            request = wire.decode(line)
            if request["op"] == "retire":
                return True
            try:
                if request["op"] == "open":
                    prober = _open(request, requests)
                    stack.callback(prober.close)
                    reply: dict[str, Any] = {"setting": prober.setting}
                else:
                    assert prober is not None
                    known = prober.setting
                    probe = prober.probe(request["batch_size"], steps=request["steps"], confirm=request["confirm"])
                    reply = {"probe": probe, "worn": prober.worn, **({} if prober.setting is known else {"setting": prober.setting})}
            except Exception as error:  # noqa: BLE001 whatever the user's code raises is the answer
                reply = {"error": wire.error_to(error, users_traceback(error))}
            if os.getpid() != served_by:
                os._exit(0)  # the step forked and came back twice: one process answers
            wire.write_all(replies.fileno(), wire.encode(reply))
    return False


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
    from autobatch.simulate.foresight import foreseeing

    device = open_device(options["device"])
    workload, defaults = _workload(request, requests)
    settled = None if options["settled"] is None else from_plain(Setting, options["settled"])
    with foreseeing(workload, device.capability if settled is None else None) as foreseen:
        return InlineProber(
            workload,
            device,
            memory_budget=options["memory_budget"],
            margin=options["margin"],
            settled=settled,
            keep_state=False,
            ran_before=options["ran_before"],
            defaults=defaults,
            foreseen=foreseen,
        )


def _workload(request: Mapping[str, Any], requests: IO[bytes]) -> tuple[Any, dict[str, Any]]:
    if "target" in request:
        from autobatch.workload.target import load_target

        return load_target(request["target"], request["options"])
    import cloudpickle

    from autobatch.workload.workload import build_workload

    # What was imported there by name must be found here: a script's own folder is on the path of the process that runs it alone.
    sys.path += [folder for folder in request["path"] if folder not in sys.path]
    arguments = cloudpickle.loads(requests.read(request["payload"]))
    return build_workload(**arguments), {}


def _load_torch() -> None:
    """Load what every worker needs, with the allocator set before torch takes its first block: readings on the CPU depend on it."""
    from autobatch.devices.allocator import exact_allocator

    exact_allocator()
    with preload.uncollected():
        import torch._dynamo  # what the first optimizer of a process loads  # noqa: F401

        import autobatch.probe.inline  # what every worker would import again
        import autobatch.workload.target  # noqa: F401


def _clean_up() -> None:
    """Run what the workload and its libraries do at the end of a process; multiprocessing kills its workers, and their sockets stay."""
    import psutil

    folders = set[Path]()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            folders |= keeper.socket_folders(process)
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    keeper.remove(folders)


def _finish(code: int) -> NoReturn:
    """End this process; the interpreter's long goodbye is skipped, and nothing that fails on the way changes the exit code."""
    _clean_up()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _exit_code(ended: SystemExit) -> int:
    """Return the exit code that ``sys.exit`` asks for; as the interpreter does, a text is printed and means 1."""
    if ended.code is None or isinstance(ended.code, int):
        return int(ended.code or 0) & 0xFF
    with contextlib.suppress(Exception):
        sys.stderr.write(f"{ended.code}\n")
    return 1


def _work(requests_fd: int, replies_fd: int, says: int) -> NoReturn:
    """Serve until there is nothing more to answer, then end this process."""
    try:
        # Unbuffered and never closed: what the workload does to these descriptors must not be met again on the way out.
        requests, replies = open(requests_fd, "rb", closefd=False), open(replies_fd, "wb", buffering=0, closefd=False)  # noqa: SIM115
        known = set(sys.modules)
        if not serve(requests, replies):
            _finish(0)
        imported = preload.imported_since(known)
        _clean_up()
        os.write(says, keeper.MAKES_ROOM + imported)
        replies.write(wire.encode({"retired": True}))
        _finish(0)
    except SystemExit as ended:
        _finish(_exit_code(ended))
    except KeyboardInterrupt as raised:
        with contextlib.suppress(BaseException):
            sys.stderr.write(users_traceback(raised))
            sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except OSError:
        os._exit(wire.PIPE_LOST)  # the workload closed our pipes, or nobody reads them any more
    except BaseException:  # noqa: BLE001 a fault of ours: it is shown, and the process must end here all the same
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    os._exit(1)


def main() -> None:
    """Keep one worker after another serving the two descriptors named on the command line."""
    keeper.prepare(int(sys.argv[3]))
    descriptors = int(sys.argv[1]), int(sys.argv[2])
    for fd in descriptors:
        os.set_inheritable(fd, False)
    _load_torch()
    keeper.keep(functools.partial(_work, *descriptors))


if __name__ == "__main__":
    main()
