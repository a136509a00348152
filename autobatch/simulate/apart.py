"""Runs a function where it cannot take the caller down: in a forked child, in a fresh process where forking will not do."""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autobatch.devices.forget import first_line, said_by

Result = TypeVar("Result")
# Tensors with more numbers than this go to a fresh process as their shapes alone.
_SMALL = 4096
# How autograd says that this process has run a backward pass before it was forked.
_THREADS = "autograd's threading"
_START = "import sys; from autobatch.simulate.apart import _serve; _serve(int(sys.argv[1]))"


class Died(Exception):
    """The process that ran the function ended before it gave a result; the text says how."""


class Unsendable(RuntimeError):
    """Stands for an error that cannot be sent between processes; its text is that error's name and text."""


class TookTooLong(Exception):
    """The function was still running when its time was up."""


def told(error: BaseException) -> str:
    """Return an error's name and the first line of its text."""
    first = first_line(error)
    return first if isinstance(error, Unsendable) else f"{type(error).__name__}: {first}"


def run_apart(function: Callable[[], Result], *, seconds: float | None = None, hollow: bool = True) -> Result:
    """Return what ``function`` returns; it runs in a process of its own, whatever that does to itself. As ``run_each_apart``."""
    return run_each_apart([function], seconds=seconds, hollow=hollow)[0]


def run_each_apart(functions: Sequence[Callable[[], Result]], *, seconds: float | None = None, hollow: bool = True) -> list[Result]:
    """Return what each of ``functions`` returns; each runs in a process of its own, side by side. As ``each_apart``."""
    with each_apart(functions, seconds=seconds, hollow=hollow) as results:
        return results()


@contextlib.contextmanager
def each_apart(
    functions: Sequence[Callable[[], Result]], *, seconds: float | None = None, hollow: bool = True
) -> Iterator[Callable[[], list[Result]]]:
    """Run each of ``functions`` in a process of its own, beside this one; give a function that waits for what they return.

    What still runs at the end is stopped.

    Args:
        functions: called without arguments; what they return or raise must pickle.
        seconds: after which they are stopped, counted from their start, ``None`` for no limit.
        hollow: whether tensors may be sent without their values where a process has to be started afresh.

    Raises:
        Died: a process ended by a signal or an exit.
        TookTooLong: ``seconds`` have passed.
        Exception: what a function raises.
    """
    if not hasattr(os, "fork"):
        yield lambda: [function() for function in functions]
        return
    with contextlib.closing(_Forks(seconds)) as forks:
        for function in functions:
            forks.start(function)

        def results() -> list[Result]:
            try:
                return forks.results()
            except RuntimeError as error:
                if _THREADS not in said_by(error):
                    raise
            return [_fresh(function, seconds, hollow) for function in functions]

        yield results


class _Forks:
    """Forked children and the pipes that their answers come through."""

    def __init__(self, seconds: float | None) -> None:
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._children: list[tuple[int, int]] = []
        self._answers: list[bytes] = []

    def start(self, function: Callable[[], Any]) -> None:
        """Run ``function`` in a child."""
        self._children.append(_fork(function))

    def results(self) -> list[Any]:
        """Return what they returned, or raise what the first of them raised."""
        try:
            self._answers = [_read(reading, self._deadline) for _, reading in self._children]
        finally:
            codes = self.close()
        return [_take(answer, code) for answer, code in zip(self._answers, codes, strict=True)]

    def close(self) -> list[int]:
        """Stop those that have not answered and return how each ended; a second call does nothing."""
        codes = []
        while self._children:
            child, reading = self._children.pop(0)
            os.close(reading)
            if not self._answers:
                os.kill(child, signal.SIGKILL)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return codes


def _fork(function: Callable[[], Any]) -> tuple[int, int]:
    """Start ``function`` in a forked child; return its process id and the pipe that its answer comes through."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        torch.set_num_threads(1)  # the threads of the parent are not here, and OpenMP would wait for them
        _answer(function, writing)
    os.close(writing)
    return child, reading


def _answer(function: Callable[[], Any], writing: int) -> None:
    """Run ``function``, write what came of it, and end this process without any of the caller's clean-up."""
    code = 1
    try:
        try:
            answer = _pickled((True, function()))
        except BaseException as error:  # noqa: BLE001 whatever it raises is the caller's to see
            answer = _pickled((False, error))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(answer)
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _pickled(value: tuple[bool, Any]) -> bytes:
    try:
        data = pickle.dumps(value)
        pickle.loads(data)  # an exception may pickle and still not come back
        return data
    except Exception:  # noqa: BLE001 of what cannot be sent, the text can
        done, what = value
        return pickle.dumps((done, Unsendable(told(what))))


def _read(pipe: int, deadline: float | None) -> bytes:
    """Return all that comes out of ``pipe`` until its other end is closed."""
    parts: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            # An answer is whole before its first byte is sent: what has begun to come is in time, however late it is asked for.
            left = None if deadline is None or parts else max(0.0, deadline - time.monotonic())
            if left is not None and not selector.select(left):
                raise TookTooLong("the time was up")
            if not (part := os.read(pipe, 2**20)):
                return b"".join(parts)
            parts.append(part)


def _take(answer: bytes, code: int) -> Any:
    if not answer:
        how = f"was ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise Died(f"the process {how}")
    done, what = pickle.loads(answer)
    if not done:
        raise what
    return what


def _fresh(function: Callable[[], Any], seconds: float | None, hollow: bool) -> Any:
    """Run ``function`` in a process that is started afresh."""
    reading, writing = os.pipe()
    with subprocess.Popen([sys.executable, "-c", _START, str(writing)], stdin=subprocess.PIPE, pass_fds=[writing]) as process:
        os.close(writing)
        assert process.stdin is not None
        try:
            process.stdin.write(_packed((sys.path, function), hollow))
            process.stdin.close()
            answer = _read(reading, None if seconds is None else time.monotonic() + seconds)
        except BrokenPipeError:
            answer = b""
        finally:
            os.close(reading)
            if not process.stdin.closed:
                process.stdin.close()
            process.kill()
    return _take(answer, process.returncode)


def _serve(writing: int) -> None:
    """Run the function that comes through the standard input; the other end of ``_fresh``."""
    import cloudpickle

    data = sys.stdin.buffer.read()
    path, function = cloudpickle.loads(data)
    sys.path[:] = path
    _answer(function, writing)


def _packed(value: Any, hollow: bool) -> bytes:
    import cloudpickle

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            if hollow and isinstance(obj, Tensor) and obj.numel() > _SMALL:
                kind = isinstance(obj, nn.Parameter)
                return _hollow, (tuple(obj.shape), tuple(obj.stride()), obj.dtype, obj.requires_grad, kind)
            return super().reducer_override(obj)

    buffer = BytesIO()
    Pickler(buffer).dump(value)
    return buffer.getvalue()


def _hollow(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, requires_grad: bool, parameter: bool) -> Tensor:
    """Return a tensor of that shape without memory."""
    tensor = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return nn.Parameter(tensor, requires_grad=requires_grad) if parameter else tensor
