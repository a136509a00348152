"""The worker process: opens one workload, answers one probe after another, and ends with its parent.

Started as ``python -m autobatch.probe.child REQUEST_FD REPLY_FD``. Standard output and standard error stay the user's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, TYPE_CHECKING, Any

from autobatch.probe import wire

if TYPE_CHECKING:
    from autobatch.probe.inline import InlineProber

_PR_SET_PDEATHSIG = 1
# Frames of the machinery that called the user's code; their own traceback begins below them.
_OURS = tuple(str(Path(__file__).parents[1] / room) for room in ("probe", "workload", "devices"))


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer requests until the parent closes its end."""
    prober: InlineProber | None = None
    with contextlib.ExitStack() as stack:
        for line in iter(requests.readline, b""):
            request = wire.decode(line)
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
    if not str(options["device"] or "").startswith("cuda"):
        # Before torch takes its first large block, else readings on the CPU are not exact.
        from autobatch.devices.allocator import exact_allocator

        exact_allocator()
    from autobatch.devices import open_device
    from autobatch.probe.inline import InlineProber

    device = open_device(options["device"])
    workload, defaults = _workload(request, requests)
    return InlineProber(
        workload,
        device,
        memory_budget=options["memory_budget"],
        margin=options["margin"],
        cap=options["cap"],
        keep_state=False,
        ran_before=options["ran_before"],
        defaults=defaults,
    )


def _workload(request: Mapping[str, Any], requests: IO[bytes]) -> tuple[Any, dict[str, Any]]:
    if "target" in request:
        from autobatch.workload.target import load_target

        return load_target(request["target"], request["options"])
    import cloudpickle

    from autobatch.workload.workload import build_workload

    arguments = cloudpickle.loads(requests.read(request["payload"]))
    return build_workload(**arguments), {}


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however that ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)


@contextlib.contextmanager
def _pipes(request_fd: int, reply_fd: int) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    for fd in (request_fd, reply_fd):
        os.set_inheritable(fd, False)
    with open(request_fd, "rb") as requests, open(reply_fd, "wb") as replies:
        yield requests, replies


def main() -> None:
    """Serve on the two descriptors named on the command line."""
    _die_with_parent()
    with _pipes(int(sys.argv[1]), int(sys.argv[2])) as (requests, replies):
        serve(requests, replies)


if __name__ == "__main__":
    main()
