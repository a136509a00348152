"""What a step is expected to need on a card that is here, before anything runs on it: where the real search begins."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

from autobatch.core.units import format_bytes
from autobatch.simulate.affine import AffineTrace, points_of
from autobatch.simulate.apart import each_apart, told
from autobatch.simulate.step import SIZES, trace_size
from autobatch.simulate.trace import Trace
from autobatch.workload.workload import Workload

# A search without a prediction takes two probes more; a trace that lasts longer than they do is not worth its time.
SECONDS = 2.0

Expected = tuple[tuple[int, int], ...]


@contextlib.contextmanager
def foreseeing(
    work: Workload, capability: tuple[int, int] | None, seconds: float = SECONDS
) -> Iterator[Callable[[], tuple[Expected, str]]]:
    """Give a function that returns what ``work`` is expected to need as (batch size, bytes), and what to say of it.

    Nothing is expected where it cannot be told in time. The step runs on tensors without memory in processes apart, beside whatever the
    caller does until it asks: neither the model nor the device is touched, whatever the step does. An expectation only decides where a
    search begins.

    Args:
        work: the training step.
        capability: the card's compute capability, ``None`` for what is no card.
        seconds: after which the search goes on without, counted from the start.
    """
    if capability is None:
        yield nothing
        return
    sizes = [functools.partial(trace_size, work, capability, False, size) for size in SIZES[:2]]
    with each_apart(sizes, seconds=seconds) as traces:
        yield functools.partial(_read, traces)


def nothing() -> tuple[Expected, str]:
    """Expect nothing and say nothing."""
    return (), ""


def _read(traces: Callable[[], list[Trace]]) -> tuple[Expected, str]:
    try:
        expected = points_of(AffineTrace.nearly(*traces()))
    except Exception as error:  # noqa: BLE001 a step that cannot be traced is searched as any other; its own errors are told by the first trial
        return (), f"not simulated beforehand ({told(error)}), so the search began at the smallest size"
    return expected, f"a simulation beforehand expected {format_bytes(expected[0][1])} at one row, and decided where the search began"
