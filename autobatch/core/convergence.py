"""What a noise scale φ says about a batch size: which constraint binds, and the size at which training is soonest done.

To a given loss it takes steps in proportion to 1 + φ/B (McCandlish et al. 2018, arXiv 1812.06162, equation 2.6) of t(B) = a + b·B seconds
each. Their product is least at B = √(a·φ / b), halfway in logarithms between the size at which the device is half busy and φ.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from autobatch.core.noise_scale import NoiseScale
from autobatch.core.throughput import knee_size

if TYPE_CHECKING:
    from autobatch.core.plan import BatchPlan


def soonest(seconds_per_batch: float, seconds_per_sample: float, noise_scale: float) -> float:
    """Return the B that minimises (1 + φ/B)·(a + b·B): √(a·φ / b), in rows; infinite where rows are free.

    With accumulation, a is what an optimizer step costs beside its micro-batches, and b the seconds of a row in them over all devices.
    """
    return math.sqrt(seconds_per_batch * noise_scale / seconds_per_sample) if seconds_per_sample > 0 else math.inf


def efficiency(noise_scale: float, batch_size: float, base_batch_size: float) -> float:
    """Return what a row is worth in a batch, as a share of its worth at the base batch size: (φ + M0) / (φ + M).

    Qiao et al. 2021 (Pollux), arXiv 2008.12260.
    """
    return (noise_scale + base_batch_size) / (noise_scale + batch_size)


def with_noise_scale(plan: BatchPlan, noise: NoiseScale) -> BatchPlan:
    """Return ``plan`` with what ``noise`` means for it among its notes; its batch size stays, for the noise scale grows in training."""
    notes = [f"{noise}: {'; '.join(noise.notes)}", *_worth(plan, noise), *_binding(plan, noise)]
    return dataclasses.replace(plan, notes=(*plan.notes, *notes))


def _worth(plan: BatchPlan, noise: NoiseScale) -> list[str]:
    if noise.value is None or plan.global_batch_size <= plan.base_batch_size:
        return []
    share = efficiency(noise.value, plan.global_batch_size, plan.base_batch_size)
    return [
        f"a row in a global batch of {plan.global_batch_size:,} brings {share:.0%} of what it brings in one of {plan.base_batch_size:,} "
        "(Qiao et al. 2021, arXiv 2008.12260)"
    ]


def _binding(plan: BatchPlan, noise: NoiseScale) -> list[str]:
    """Return which of memory, throughput and convergence ends the use of larger batches first, without accumulation."""
    line, devices = plan.throughput, plan.world_size
    if line is None or not line.holds:
        return ["what binds is not known: the step times are on no line of a + b × rows, so √(aφ / b) cannot be had"]
    a, b = line.seconds_per_batch, line.seconds_per_sample / devices
    limits = {"memory": float(plan.best * devices), "throughput": knee_size(a, b, line.fraction)}
    scales = [noise.lower_bound] if noise.value is None else [noise.value, noise.low or 0.0, noise.high or math.inf]
    best, *interval = (soonest(a, b, scale) for scale in scales)
    if noise.value is not None:
        limits["convergence"] = best
    binds = min(limits, key=lambda name: limits[name])
    said = {
        "memory": f"memory: {limits['memory']:,.0f} rows fit",
        "throughput": f"throughput: from {limits['throughput']:,.0f} rows on a larger batch is hardly faster",
        "convergence": f"convergence: beyond {best:,.3g} rows a larger batch takes longer to a given loss",
    }
    least = "at least " if noise.value is None else ""
    between = f" ({interval[0]:,.3g} – {interval[1]:,.3g})" if interval else ""
    if noise.value is None and best < limits[binds]:
        return [f"whether convergence binds is not known; among the others, {said[binds]}"]
    return [
        f"binding now: {said[binds]}; (1 + φ/B) × (a + bB), the time to a given loss, is least at {least}{best:,.3g} rows{between}, "
        "an order of magnitude"
    ]
