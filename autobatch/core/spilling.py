"""Drivers that move what does not fit to host memory instead of failing: only the time a row takes tells."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from autobatch.core.records import Outcome, Probe

# A row takes less time the more of them are in a batch. One that takes this much more was waited for: host memory is ten times slower.
_SLOWER = 3.0


def spilled(probe: Probe, before: Sequence[Probe]) -> Probe:
    """Return ``probe``, as ``tight`` where its rows took three times as long as those of a smaller batch did."""
    smaller = [1 / known.samples_per_second for known in before if known.batch_size < probe.batch_size and known.samples_per_second]
    if not probe.outcome.fits or not probe.samples_per_second or not smaller:
        return probe
    times = 1 / probe.samples_per_second / min(smaller)
    if times < _SLOWER:
        return probe
    message = f"a row took {times:.1f} times as long as in a smaller batch: the driver has likely moved memory to the host"
    return dataclasses.replace(probe, outcome=Outcome.TIGHT, message=message)
