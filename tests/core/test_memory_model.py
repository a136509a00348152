"""The memory model: what it predicts, what it advises, and when it counts as confirmed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.core.memory_model import CONFIRMED, NEAR_WALL, WOBBLE, MemoryModel
from autobatch.core.records import Outcome, Peak, Probe
from autobatch.core.units import GIB, MIB

CAP = 24 * GIB


def probe(size: int, forward_backward: float, optimizer: float | None = None, outcome: Outcome = Outcome.FIT) -> Probe:
    return Probe(
        batch_size=size,
        outcome=outcome,
        forward_backward=Peak(allocated=int(forward_backward)),
        optimizer=None if optimizer is None else Peak(allocated=int(optimizer)),
    )


def model_of(*probes: Probe) -> MemoryModel:
    model = MemoryModel(CAP)
    for one in probes:
        model.observe(one)
    return model


def test_the_peak_is_the_higher_of_two_phases() -> None:
    model = model_of(probe(1, 2 * GIB, 5 * GIB), probe(11, 3 * GIB, 5 * GIB))
    assert model.predict(21) == 5 * GIB
    assert model.predict(31) == 5 * GIB
    assert model.predict(41) == 6 * GIB
    assert model.largest(8 * GIB) == 61
    assert model.largest(4 * GIB) == 0


@given(st.integers(0, 8 * GIB), st.integers(MIB, 200 * MIB), st.integers(1, 9), st.integers(2, 9))
def test_two_exact_readings_give_the_wall(fixed: int, per_sample: int, size: int, factor: int) -> None:
    model = model_of(probe(size, fixed + per_sample * size), probe(size * factor, fixed + per_sample * size * factor))
    assert model.predict(1000) == pytest.approx(fixed + per_sample * 1000, rel=1e-9)
    largest = model.largest(CAP)
    assert largest is not None
    assert abs(largest - (CAP - fixed) // per_sample) <= 1


def test_one_reading_predicts_nothing_and_advises_as_if_every_row_cost_its_share() -> None:
    model = model_of(probe(1, GIB))
    assert (model.predict(2), model.largest(CAP), model.residual, model.confirmed_limit(1)) == (None, None, None, None)
    assert model.suggest(1, None) == 23  # 24 GiB at 1 GiB a row, less the wobble that is expected


def test_a_flat_peak_has_no_last_size() -> None:
    model = model_of(probe(1, GIB), probe(64, GIB))
    assert model.largest(CAP) is None
    assert model.confirmed_limit(64) is None


def test_the_residual_is_the_largest_miss() -> None:
    model = model_of(probe(1, GIB), probe(11, 2 * GIB), probe(21, 3 * GIB), probe(31, 4.4 * GIB))
    assert model.residual == pytest.approx(0.4 / 4.4)


def test_a_probe_that_did_not_fit_or_has_no_reading_says_nothing() -> None:
    model = model_of(probe(1, GIB), probe(11, 9 * GIB, outcome=Outcome.OOM), Probe(batch_size=5, outcome=Outcome.FIT))
    assert model.predict(3) is None


def test_a_wall_is_confirmed_by_a_probe_close_to_it_that_came_out_as_predicted() -> None:
    def row(size: int, off: float = 0.0) -> Probe:
        return probe(size, (GIB + size * 100 * MIB) * (1 + off))

    wall = (CAP - GIB) // (100 * MIB)  # 235
    near, far = int(wall * (1 - NEAR_WALL / 2)), int(wall * (1 - 2 * NEAR_WALL))
    limit = model_of(row(1), row(60), row(near)).confirmed_limit(near)
    assert limit is not None
    assert wall <= limit <= wall * 1.005
    assert model_of(row(1), row(60), row(far)).confirmed_limit(far) is None
    assert model_of(row(1), row(60), row(near, 2 * CONFIRMED)).confirmed_limit(near) is None
    assert model_of(row(1), row(near)).confirmed_limit(near) is None  # nothing had predicted it


def test_under_a_wall_the_next_size_is_just_below_it() -> None:
    model = model_of(probe(1, GIB), probe(101, 11 * GIB))
    assert model.suggest(101, 300) == 229  # far below the wall: as far up as must fit
    assert model.suggest(101, 110) == 107  # 2 % under a wall that came earlier
    assert model.suggest(101, 200) == 187  # an eighth of the way back from one that came much earlier
    assert model.suggest(101, None) in range(220, 232)


def test_walls_far_below_what_was_predicted_are_approached_by_factors() -> None:
    model = model_of(probe(1, 4 * GIB), probe(101, 4 * GIB + GIB // 4))
    for wall, asked in ((2000, 1762), (1762, int((101 * 1762) ** 0.5))):
        model.observe(Probe(batch_size=wall, outcome=Outcome.OOM))
        assert model.suggest(101, wall) == asked


def test_where_rows_turn_out_to_cost_more_the_last_stretch_counts() -> None:
    steeper = [probe(1, 2 * GIB), probe(101, 2 * GIB + 100 * MIB), probe(1000, 12 * GIB), probe(1500, 22.9 * GIB)]
    room = CAP * (1 - WOBBLE) - 22.9 * GIB * (1 + WOBBLE)
    assert model_of(*steeper).suggest(1500, None) == 1500 + int(room / (10.9 * GIB / 500))


@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 64 * GIB), st.integers(0, 64 * GIB)), max_size=6), st.integers(1, 2**40))
def test_no_readings_break_it(readings: list[tuple[int, int, int]], cap: int) -> None:
    model = MemoryModel(cap)
    for size, forward_backward, optimizer in readings:
        model.observe(probe(size, forward_backward, optimizer))
        for wall in (None, size + 7):
            advice = model.suggest(size, wall)
            assert advice is None or isinstance(advice, int)
        assert model.confirmed_limit(size) is None or model.confirmed_limit(size) >= size  # type: ignore[operator]
        assert model.largest(cap) is None or model.largest(cap) >= 0  # type: ignore[operator]


def test_what_is_expected_is_calibrated_by_the_first_probe() -> None:
    """A simulation that asks for a tenth too little: begins below half, and aims short of the wall that the probe puts right."""
    model = MemoryModel(1000 * MIB, expected=lambda size: (90 + 0.9 * size) * MIB)
    start = model.start(2**20)
    assert start == 411  # 90 + 0.9 · 411 MiB are the most below 46 %
    model.observe(probe(start, (100 + start) * MIB))
    assert model.largest(model.cap) == 900
    assert model.suggest(start, None) == start + int(0.99 * (900 - start))


def test_what_is_expected_is_forgotten_where_it_did_not_fit() -> None:
    model = MemoryModel(1000 * MIB, expected=lambda size: size * MIB / 10)
    model.observe(Probe(batch_size=4600, outcome=Outcome.OOM))
    assert model.start(2**20) is None
    model.observe(probe(1, 101 * MIB))
    assert model.suggest(1, 4600) == 9  # as without any: ten times as much fits even if every row costs as much as the first


def test_the_start_is_held_by_what_is_permitted() -> None:
    assert MemoryModel(1000 * MIB, expected=lambda size: size * MIB).start(64) == 64
    assert MemoryModel(MIB, expected=lambda size: 2 * MIB + size).start(64) is None
