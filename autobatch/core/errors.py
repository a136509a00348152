"""The errors autobatch raises, each with the exit code the command line ends with.

    AutobatchError             1
    ├── InvalidRequest         2   an argument that cannot be meant (also a ValueError)
    ├── DeviceUnavailable      3   no such device, or one that cannot be held to a limit
    ├── NoBatchSizeFits        4   the smallest permitted batch size does not fit
    ├── WorkloadFailed         5   the user's target or step failed for its own reasons
    └── WorkerFailed           6   the worker process died, hung or broke off

Every message says what happened, with numbers; the likely cause; and what to type next.
"""

from __future__ import annotations


class AutobatchError(Exception):
    """Base of every error autobatch raises itself."""

    exit_code = 1


class InvalidRequest(AutobatchError, ValueError):
    """An argument is outside what it can mean."""

    exit_code = 2


class DeviceUnavailable(AutobatchError):
    """The device does not exist here, or its memory cannot be held to a limit."""

    exit_code = 3


class NoBatchSizeFits(AutobatchError):
    """The smallest permitted batch size does not fit into the budget.

    Attributes:
        batch_size: the smallest permitted batch size, which was run and did not fit.
        needed: bytes that it needs, as far as they are known; ``None`` when nothing could be measured.
        available: bytes a trial was allowed to use; ``None`` where nothing limits it but the hardware.
    """

    exit_code = 4

    def __init__(self, message: str, *, batch_size: int, needed: int | None, available: int | None) -> None:
        super().__init__(message)
        self.batch_size = batch_size
        self.needed = needed
        self.available = available


class WorkloadFailed(AutobatchError):
    """The user's own code failed: loading the target, or running its step.

    Attributes:
        traceback_text: the user's traceback as text, empty when the failure has none.
        batch_size: the batch size at which the step failed; ``None`` while loading.
        original: the user's own exception, where it happened in a worker and could be sent back.
    """

    exit_code = 5

    def __init__(self, message: str, *, traceback_text: str = "", batch_size: int | None = None, original: Exception | None = None) -> None:
        super().__init__(message)
        self.traceback_text = traceback_text
        self.batch_size = batch_size
        self.original = original


class WorkerFailed(AutobatchError):
    """The worker process died, hung or closed its pipe.

    Attributes:
        stderr_tail: the last lines the worker wrote to its standard error.
    """

    exit_code = 6

    def __init__(self, message: str, *, stderr_tail: str = "") -> None:
        super().__init__(message)
        self.stderr_tail = stderr_tail
