"""What a search costs, on synthetic workloads: ``python -m benchmarks.search_cost [--json FILE]``.

Workloads: a fixed part of 0.2 to 8 GiB and 10^5.5 to 10^8.3 bytes a sample (both log-uniform), an optimizer phase of 1 to 1.4 × the fixed
part, peaks rounded to 2 MiB, cards of 8 to 139 GiB (uniform), always the same seed; one whose batch size 1 does not fit is drawn again.
Probes are those of the search; the longer trial that confirms its answer comes on top, once.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from autobatch.core.memory_model import MemoryModel
from autobatch.core.records import SearchSpace
from autobatch.core.search import Search
from autobatch.core.units import GIB
from autobatch.simulate.synthetic import SyntheticProber, SyntheticWorkload

COUNT = 2000
SEED = 20261121
WOBBLES = (0.0, 0.002, 0.03)
# A simulation that is off by up to 10 %, and ones that are wrong by ten times.
STEERED = (("steered ±10 %", 0.1, 1.0), ("steered ×10", 0.1, 10.0), ("steered ÷10", 0.1, 0.1))


# Peaks that are no line: rows that cost 2 to 40 % more from some size on, without and with a flat moment of 10 to 50 % of the memory that
# hides the rows up to there.
BENT = ("bent", "hidden")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the searches of one row of the table took, over all workloads.

    Attributes:
        search: ``"model"``, ``"plain"``, or ``"steered"`` by an expectation, with the error of that.
        wobble: relative wobble of the peaks.
        median_probes, mean_probes: trials of the search.
        out_of_memory: mean trials that did not fit.
        rows: rows run over all trials, as a mean multiple of the answer.
        worst: smallest answer as a fraction of the true maximum.
        untested: share of answers that were not themselves run and fitted.
    """

    search: str
    wobble: float
    median_probes: float
    mean_probes: float
    out_of_memory: float
    rows: float
    worst: float
    untested: float


def workloads(count: int = COUNT, seed: int = SEED) -> Iterator[SyntheticWorkload]:
    """Yield ``count`` workloads, the same for the same seed."""
    draw = random.Random(seed)
    while count > 0:
        workload = SyntheticWorkload(
            capacity=int(draw.uniform(8, 139) * GIB),
            fixed=int(math.exp(draw.uniform(math.log(0.2), math.log(8))) * GIB),
            per_sample=int(10 ** draw.uniform(5.5, 8.3)),
            optimizer=draw.uniform(1.0, 1.4),
            seed=draw.getrandbits(32),
        )
        if replace(workload, wobble=max(WOBBLES)).fits(1):
            count -= 1
            yield workload


def bent(workload: SyntheticWorkload, how: str) -> SyntheticWorkload:
    """Return ``workload`` with a peak of one of the kinds of ``BENT``, the same for the same workload."""
    draw = random.Random(workload.seed)
    rows = (workload.capacity - workload.fixed) / workload.per_sample
    bend, steeper, flat = draw.uniform(0.02, 0.9), draw.uniform(1.02, 1.4), draw.uniform(0.1, 0.5)
    hides = int(flat * workload.capacity) if how == "hidden" else 0
    return replace(workload, bend=int(bend * rows), steeper=steeper, flat=hides)


def expectation(workload: SyntheticWorkload, error: float) -> Callable[[int], float]:
    """Return what a simulation would expect of ``workload`` that is off by up to ``error``, fixed part and rows each on their own."""
    draw = random.Random(workload.seed)
    fixed, rows = (part * (1 + draw.uniform(-error, error)) for part in (workload.fixed, workload.per_sample))
    return lambda size: max(fixed + rows * size, fixed * workload.optimizer)


def run(
    workload: SyntheticWorkload, *, advised: bool, tolerance: float = 0.01, expected: Callable[[int], float] | None = None
) -> tuple[int, list[tuple[int, bool]]]:
    """Return the answer of one search and its trials as ``(batch size, fits)``."""
    prober = SyntheticProber(workload)
    model = MemoryModel(prober.setting.cap, expected)
    search = Search(SearchSpace(tolerance=tolerance), model if advised else None)
    trials = []
    while (size := search.ask()) is not None:
        probe = prober.probe(size)
        model.observe(probe)
        search.tell(size, probe.outcome.fits)
        trials.append((size, probe.outcome.fits))
    assert search.best is not None
    return search.best, trials


def measure(wobble: float, *, advised: bool, count: int = COUNT, steered: tuple[str, float, float] | None = None, kind: str = "") -> Cost:
    """Return what the searches cost when peaks wobble by ``wobble``.

    ``steered`` names an expectation, its error and a factor on it; ``kind`` says that peaks are no line, and how.
    """
    probes, failures, rows, worst, untested = [], [], [], 1.0, 0
    for base in workloads(count):
        workload = replace(bent(base, kind) if kind else base, wobble=wobble)
        answer, trials = run(
            workload, advised=advised, expected=_scaled(expectation(workload, steered[1]), steered[2]) if steered else None
        )
        probes.append(len(trials))
        failures.append(sum(not fits for _, fits in trials))
        rows.append(sum(size for size, _ in trials) / answer)
        worst = min(worst, answer / workload.largest_fit())
        untested += (answer, True) not in trials
    return Cost(
        search=steered[0] if steered else (kind or "model") if advised else f"plain, {kind}" if kind else "plain",
        wobble=wobble,
        median_probes=statistics.median(probes),
        mean_probes=statistics.mean(probes),
        out_of_memory=statistics.mean(failures),
        rows=statistics.mean(rows),
        worst=worst,
        untested=untested / count,
    )


def _scaled(expected: Callable[[int], float], factor: float) -> Callable[[int], float]:
    return lambda size: factor * expected(size)


def table(costs: list[Cost]) -> list[str]:
    """Return the figures as lines."""
    lines = [f"{'search':<14}{'wobble':>8}{'median':>8}{'mean':>7}{'OOM':>7}{'rows':>8}{'worst':>8}{'untested':>10}"]
    for c in costs:
        lines.append(
            f"{c.search:<14}{c.wobble:>8.1%}{c.median_probes:>8g}{c.mean_probes:>7.2f}{c.out_of_memory:>7.2f}{c.rows:>7.2f}×{c.worst:>8.1%}"
            f"{c.untested:>10.1%}"
        )
    return lines


def main() -> None:
    costs = [measure(wobble, advised=advised) for advised in (True, False) for wobble in WOBBLES]
    costs += [measure(wobble, advised=True, steered=how) for how in STEERED for wobble in WOBBLES[:2]]
    costs += [measure(WOBBLES[1], advised=advised, kind=kind) for kind in BENT for advised in (True, False)]
    print(f"search cost over {COUNT} synthetic workloads at 1 % tolerance (a confirming trial comes on top)")
    print("\n".join(table(costs)))
    if "--json" in sys.argv:
        Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps([asdict(cost) for cost in costs], indent=2) + "\n")


if __name__ == "__main__":
    main()
