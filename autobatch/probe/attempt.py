"""One attempt of a function that is not ours: it raises when its batch does not fit, whatever framework it uses."""

from __future__ import annotations

import time
from collections.abc import Callable

from autobatch.core.records import Outcome, Probe
from autobatch.devices.forget import first_line, forget, give_back
from autobatch.devices.oom import classify


def attempt(run: Callable[[int], object], batch_size: int) -> Probe:
    """Return whether ``run(batch_size)`` ran through, and what a failed run held given back.

    Raises:
        Exception: whatever ``run`` raises that is not about memory.
    """
    outcome, message, started = Outcome.FIT, "", time.perf_counter()
    failure = None
    try:
        run(batch_size)
    except Exception as error:
        verdict = classify(error)
        if verdict is None:
            raise
        outcome, message, failure = verdict, first_line(error), error
    seconds = time.perf_counter() - started
    if failure is not None:
        forget(failure)  # not in the handler: there the interpreter itself still holds the error and its frames
        give_back()
    return Probe(batch_size=batch_size, outcome=outcome, steps=1, seconds=seconds, message=message)
