"""What travels between a prober and its worker: one JSON document a line, and records in and out of it.

Requests
    ``{"op": "open", "options": {…}, "target": "train.py:build"}`` or, instead of a target, ``"payload": N`` followed by N pickled bytes
    ``{"op": "probe", "batch_size": 8, "steps": 3, "confirm": false}``
Replies
    ``{"setting": {…}}``, ``{"probe": {…}}`` or ``{"error": {"kind": …, "message": …, "traceback": …}}``
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Mapping
from typing import Any

from autobatch.core import errors
from autobatch.core.record_json import to_plain


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


def error_to(error: BaseException, traceback_text: str = "") -> dict[str, Any]:
    """Return ``error`` as an object; anything that is not autobatch's own becomes a failed workload."""
    kind = type(error).__name__
    if not isinstance(error, errors.AutobatchError):
        return {
            "kind": "WorkloadFailed",
            "message": f"{kind}: {error}",
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
    except Exception:  # noqa: BLE001 whatever the user's exception does when it is made
        return None
    return error if isinstance(error, Exception) else None
