"""What a step is expected to need on a card that is here, before anything runs on it: where the real search begins."""

from __future__ import annotations

import functools

from autobatch.core.units import format_bytes
from autobatch.simulate.affine import AffineTrace, points_of
from autobatch.simulate.apart import run_each_apart, told
from autobatch.simulate.step import SIZES, trace_size
from autobatch.workload.workload import Workload

# A search without a prediction takes two probes more; a trace that lasts longer than they do is not worth its time.
SECONDS = 2.0

Expected = tuple[tuple[int, int], ...]


def foresee(work: Workload, capability: tuple[int, int] | None, seconds: float = SECONDS) -> tuple[Expected, str]:
    """Return what ``work`` is expected to need as (batch size, bytes), and what to say of it; nothing where it cannot be told in time.

    The step runs on tensors without memory in processes apart: neither the model nor the device is touched, whatever it does. An
    expectation only decides where a search begins.

    Args:
        work: the training step.
        capability: the card's compute capability, ``None`` for what is no card.
        seconds: after which the search goes on without.
    """
    if capability is None:
        return (), ""
    try:
        small, large = run_each_apart([functools.partial(trace_size, work, capability, False, size) for size in SIZES[:2]], seconds=seconds)
        expected = points_of(AffineTrace.nearly(small, large))
    except Exception as error:  # noqa: BLE001 a step that cannot be traced is searched as any other; its own errors are told by the first trial
        return (), f"not simulated beforehand ({told(error)}), so the search began at the smallest size"
    return expected, f"a simulation beforehand expected {format_bytes(expected[0][1])} at one row, and decided where the search began"
