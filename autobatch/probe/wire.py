"""What travels between a prober and its worker: one JSON document a line, and records in and out of it.

Requests
    ``{"op": "open", "options": {…}, "target": "train.py:build"}`` or, instead of a target, ``"payload": N`` and ``"path": [folders…]``,
    followed by N pickled bytes
    ``{"op": "probe", "batch_size": 8, "steps": 3, "confirm": false}``
    ``{"op": "retire"}``: make room for a fresh worker
Replies
    ``{"setting": {…}}``, ``{"probe": {…}, "worn": false}`` (with the ``setting`` where it has changed), ``{"retired": true}`` or
    ``{"error": {"kind": …, "message": …, "traceback": …}}``
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import selectors
import time
from collections.abc import Mapping
from typing import Any

from autobatch.core import errors
from autobatch.core.record_json import to_plain
from autobatch.devices.forget import said_by

PIPE_LOST = 87  # exit code of a worker that can no longer write its replies


def encode(message: Mapping[str, Any]) -> bytes:
    """Return ``message`` as one line; records in it become objects."""
    return json.dumps(to_plain(message)).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """Return the message in ``line``.

    Raises:
        ValueError: the line is no JSON object.
    """
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


def reply(line: bytes) -> dict[str, Any]:
    """Return the reply in ``line``.

    Raises:
        ValueError: the line is none.
    """
    message = decode(line)
    if not message.keys() & {"setting", "probe", "error", "retired"}:
        raise ValueError("no reply")
    return message


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data`` to a pipe that waits for its reader."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def send(descriptor: int, data: bytes, timeout: float) -> None:
    """Write ``data`` to a pipe that does not wait.

    Raises:
        TimeoutError: nobody read all of it within ``timeout`` seconds.
        BrokenPipeError: nobody will.
    """
    deadline, view = time.monotonic() + timeout, memoryview(data)
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_WRITE)
        while view:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            view = view[os.write(descriptor, view[:65536]) :]


def receive(descriptor: int, timeout: float) -> bytes:
    """Return the next line of a pipe; what comes is shorter than a line when the other end was closed.

    Raises:
        TimeoutError: there was no whole line within ``timeout`` seconds.
    """
    deadline, parts = time.monotonic() + timeout, [b""]
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while not parts[-1].endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            part = os.read(descriptor, 65536)
            if not part:
                break
            parts.append(part)
    return b"".join(parts)


def error_to(error: BaseException, traceback_text: str = "") -> dict[str, Any]:
    """Return ``error`` as an object; anything that is not autobatch's own becomes a failed workload."""
    kind = type(error).__name__
    if not isinstance(error, errors.AutobatchError):
        return {
            "kind": "WorkloadFailed",
            "message": f"{kind}: {said_by(error)}",
            "traceback": traceback_text,
            "original": _packed(error),
        }
    return {"kind": kind, "message": str(error), "traceback": traceback_text or getattr(error, "traceback_text", "")}


def error_from(data: Mapping[str, Any], batch_size: int | None) -> errors.AutobatchError:
    """Return the error that was encoded as ``data``."""
    known = {"InvalidRequest": errors.InvalidRequest, "DeviceUnavailable": errors.DeviceUnavailable}
    kind = known.get(data["kind"])
    if kind is not None:
        return kind(data["message"])
    return errors.WorkloadFailed(
        data["message"], traceback_text=data["traceback"], batch_size=batch_size, original=_unpacked(data.get("original"))
    )


def _packed(error: BaseException) -> str | None:
    """Return ``error`` pickled, as text; ``None`` for one that cannot be sent."""
    import cloudpickle

    try:
        return base64.b64encode(cloudpickle.dumps(error)).decode()
    except Exception:  # noqa: BLE001 whatever the user's exception does when it is pickled
        return None


def _unpacked(text: str | None) -> Exception | None:
    """Return the exception packed as ``text``; ``None`` when it cannot be made again here (a class that only the worker has)."""
    if text is None:
        return None
    try:
        error = pickle.loads(base64.b64decode(text))
    except (Exception, SystemExit):  # noqa: BLE001 whatever the user's exception does when it is made
        return None
    return error if isinstance(error, Exception) else None
