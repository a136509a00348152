"""The line through step times, the knee on it, and which sizes are worth timing."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autobatch.core.records import Outcome, Probe, SearchSpace
from autobatch.core.throughput import fast_enough, fit_throughput, knee_size, next_to_time, step_times

A, B = 0.020, 0.0005
FRACTIONS = st.floats(0.5, 0.99)
SECONDS = st.floats(1e-6, 10)


def line(*sizes: int, a: float = A, b: float = B) -> dict[int, float]:
    return {size: a + b * size for size in sizes}


@pytest.mark.parametrize(("fraction", "size"), [(0.90, 360), (0.95, 760), (0.99, 3960)])
def test_the_knee_of_a_card_without_a_limit(fraction: float, size: int) -> None:
    assert knee_size(A, B, fraction) == pytest.approx(size)


@given(a=SECONDS, b=SECONDS, fraction=FRACTIONS, largest=st.integers(1, 2**20))
def test_at_the_knee_rows_a_second_are_the_fraction_of_the_largest_batchs(a: float, b: float, fraction: float, largest: int) -> None:
    size = knee_size(a, b, fraction, largest)
    assert size <= largest
    assert size / (a + b * size) == pytest.approx(fraction * largest / (a + b * largest))


def test_the_knee_where_every_row_is_free_or_every_batch_is() -> None:
    assert knee_size(A, 0.0, 0.95) == math.inf
    assert knee_size(A, 0.0, 0.95, largest=100) == pytest.approx(95)
    assert knee_size(0.0, B, 0.95) == 0


@given(a=SECONDS, b=SECONDS, sizes=st.sets(st.integers(1, 10_000), min_size=3, max_size=8))
def test_times_on_a_line_give_the_line(a: float, b: float, sizes: set[int]) -> None:
    assume(1e-4 < a / b < 1e5 and max(sizes) > 1.1 * min(sizes))
    fitted = fit_throughput(line(*sizes, a=a, b=b), 0.95)
    assert fitted is not None
    assert fitted.holds
    assert fitted.residual == pytest.approx(0, abs=1e-4)
    assert fitted.fastest == max(sizes, key=lambda size: size / (a + b * size))


def test_relative_errors_count_so_that_a_slow_large_batch_does_not_hide_the_small_ones() -> None:
    fitted = fit_throughput({**line(1, 10, 100), 10_000: 1.1 * (A + B * 10_000)}, 0.95)
    assert fitted is not None
    assert fitted.seconds_per_batch == pytest.approx(A, rel=0.02)
    assert not fit_throughput({1: 0.02, 64: 0.02, 65: 0.04, 128: 0.04}, 0.95).holds  # type: ignore[union-attr]


def test_neither_part_of_a_step_takes_less_than_no_time() -> None:
    slower = fit_throughput({1: 1.0, 2: 3.0, 4: 9.0}, 0.95)
    assert slower is not None
    assert (slower.seconds_per_batch, slower.knee) == (0.0, 1)
    faster = fit_throughput({1: 4.0, 2: 3.9, 4: 3.8}, 0.95)
    assert faster is not None
    assert (faster.seconds_per_sample, faster.knee) == (0.0, 4)


def test_two_sizes_have_a_line_but_nothing_to_check_it_against_and_one_has_none() -> None:
    two = fit_throughput(line(8, 64), 0.95)
    assert two is not None
    assert (two.residual, two.holds) == (None, False)
    assert fit_throughput(line(8), 0.95) is None
    assert fit_throughput({}, 0.95) is None


def test_the_fastest_trial_of_a_size_counts_and_those_that_did_not_fit_do_not() -> None:
    probes = [
        Probe(batch_size=8, outcome=Outcome.FIT, seconds_per_step=1.0),
        Probe(batch_size=8, outcome=Outcome.FIT, seconds_per_step=0.5, confirmation=True),
        Probe(batch_size=8, outcome=Outcome.FIT, seconds_per_step=0.7, confirmation=True),
        Probe(batch_size=4, outcome=Outcome.FIT),
        Probe(batch_size=16, outcome=Outcome.FIT, seconds_per_step=0.9),
        Probe(batch_size=32, outcome=Outcome.TIGHT, seconds_per_step=9.0),
    ]
    assert step_times(probes) == {8: 0.5, 16: 0.9}
    assert step_times(probes, largest=15) == {8: 0.5}


def test_the_predicted_knee_is_timed_and_that_settles_it() -> None:
    space, times = SearchSpace(), line(1, 100, 4000)
    knee = math.ceil(knee_size(A, B, 0.95, 4000))
    assert next_to_time(times, space, 4000, 0.95) == knee == 634
    times |= line(knee)
    assert next_to_time(times, space, 4000, 0.95) is None
    assert fast_enough(times, 0.95) == knee


def test_nothing_is_asked_without_a_clock() -> None:
    assert next_to_time({}, SearchSpace(), 4000, 0.95) is None
    assert fast_enough({}, 0.95) is None


@given(
    rates=st.lists(st.floats(0.001, 1000), min_size=4, max_size=4),
    best=st.integers(1, 5000),
    multiple=st.sampled_from([1, 3, 8, 10]),
    fraction=FRACTIONS,
    tile=st.sampled_from([1, 8, 64]),
    noise=st.integers(0, 2**32),
)
def test_whatever_the_times_the_asking_ends_and_stays_among_permitted_sizes(
    rates: list[float], best: int, multiple: int, fraction: float, tile: int, noise: int
) -> None:
    best = max(1, best // multiple) * multiple
    space = SearchSpace(max=best, multiple_of=multiple)

    def seconds(size: int) -> float:
        off = rates[hash((size, noise)) % 4] if noise % 2 else 1.0
        return off * (rates[0] + rates[1] * -(-size // tile) * tile)

    times = {size: seconds(size) for size in {space.first, best}}
    asked: list[int] = []
    while (size := next_to_time(times, space, best, fraction)) is not None:
        assert size not in times
        assert size % multiple == 0
        assert space.first <= size <= best
        times[size] = seconds(size)
        asked.append(size)
        assert len(asked) <= 40
    chosen = fast_enough(times, fraction)
    assert chosen in times
