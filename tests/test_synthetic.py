"""Memory as a formula, and the figures that a search costs on it."""

from __future__ import annotations

import pytest

from autobatch import Outcome
from autobatch.core.units import GIB, MIB
from autobatch.simulate.synthetic import SyntheticProber, SyntheticWorkload
from benchmarks.search_cost import BENT, COUNT, STEERED, measure

WORK = SyntheticWorkload(capacity=8 * GIB, fixed=GIB, per_sample=100 * MIB, optimizer=1.5)


def test_the_peak_is_the_formula_rounded_up() -> None:
    assert WORK.peaks(1) == (GIB + 100 * MIB, 3 * GIB // 2)
    assert WORK.peaks(3)[0] == GIB + 300 * MIB
    assert SyntheticWorkload(capacity=GIB, fixed=MIB, per_sample=1).peaks(1) == (2 * MIB, 2 * MIB)


def test_the_largest_fit_fits_and_the_next_does_not() -> None:
    for wobble in (0.0, 0.03):
        work = SyntheticWorkload(capacity=8 * GIB, fixed=GIB, per_sample=10 * MIB, wobble=wobble, seed=7)
        assert all(work.fits(size) for size in range(1, work.largest_fit() + 1))
        assert not work.fits(work.largest_fit() + 1)
    assert SyntheticWorkload(capacity=GIB, fixed=GIB, per_sample=MIB).largest_fit() == 0


def test_a_probe_says_what_the_formula_says() -> None:
    prober = SyntheticProber(WORK)
    fits, fails = prober.probe(71, steps=4), prober.probe(72)
    assert (fits.outcome, fits.peak_allocated, fits.steps) == (Outcome.FIT, GIB + 7100 * MIB, 4)
    assert (fails.outcome, fails.peak_allocated) == (Outcome.OOM, None)
    assert SyntheticProber(WORK, readable=False).probe(71).peak_allocated is None


@pytest.mark.parametrize("wobble", [0.0, 0.002])
def test_what_a_search_costs_with_steady_readings(wobble: float) -> None:
    assert COUNT >= 2000
    cost = measure(wobble, advised=True)
    assert cost.median_probes <= 5
    assert cost.mean_probes <= 5
    assert cost.out_of_memory <= 0.1
    assert cost.rows <= 2.2
    assert cost.worst >= 0.985
    assert cost.untested == 0


def test_what_a_search_costs_with_readings_that_wobble_by_three_percent() -> None:
    cost = measure(0.03, advised=True)
    assert cost.mean_probes <= 8
    assert cost.out_of_memory <= 2
    assert cost.rows <= 4.7
    assert cost.untested == 0


@pytest.mark.parametrize("kind", BENT)
def test_what_a_search_costs_where_the_peak_is_no_line(kind: str) -> None:
    advised, plain = (measure(0.002, advised=advised, kind=kind) for advised in (True, False))
    assert advised.mean_probes < plain.mean_probes
    assert advised.out_of_memory < plain.out_of_memory
    assert advised.worst >= 0.985
    assert advised.untested == 0


def test_a_bend_and_a_flat_moment_are_where_they_are_said_to_be() -> None:
    work = SyntheticWorkload(capacity=4 * GIB, fixed=0, per_sample=10 * MIB, bend=100, steeper=2.0, flat=500 * MIB, optimizer=0.0)
    assert [work.peaks(size)[0] // MIB for size in (1, 50, 60, 100, 110)] == [500, 500, 600, 1000, 1200]
    assert work.largest_fit() == 100 + (4 * GIB - 1000 * MIB) // (20 * MIB)


def test_plain_doubling_and_bisection_cost_several_times_as_much() -> None:
    plain, advised = measure(0.0, advised=False), measure(0.0, advised=True)
    assert plain.mean_probes > 4 * advised.mean_probes
    assert plain.rows > 4 * advised.rows
    assert plain.untested == 0


def test_a_simulation_that_is_off_by_a_tenth_saves_probes_and_one_that_is_wrong_by_ten_times_costs_few() -> None:
    plain = measure(0.002, advised=True)
    near, more, less = (measure(0.002, advised=True, steered=how) for how in STEERED)
    assert near.median_probes <= 3
    assert near.rows <= 2.05
    assert near.worst >= 0.985
    assert more.mean_probes <= plain.mean_probes + 3
    assert less.mean_probes <= plain.mean_probes + 3
    assert near.untested == more.untested == less.untested == 0
