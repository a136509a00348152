"""The noise scale from norms alone, on gradients whose noise scale is known, and what it says about a plan."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch import BatchPlan, InvalidRequest, NoiseScale
from autobatch.core.convergence import efficiency, soonest
from autobatch.core.noise_scale import estimate_noise_scale
from autobatch.core.throughput import Throughput

ROWS, MICRO = 8, 8


def gaussian(windows: int, seed: int, scale: float = 500.0, dimensions: int = 1000) -> list[tuple[float, float]]:
    """Return (q, p) of windows of micro-gradients N(G, Σ / m) with |G|² = 1 and tr Σ = ``scale``."""
    draw = np.random.default_rng(seed)
    gradients = draw.normal(0.0, math.sqrt(scale / dimensions / ROWS), (windows, MICRO, dimensions)) + 1 / math.sqrt(dimensions)
    q = (gradients**2).sum(2).mean(1)
    p = (gradients.mean(1) ** 2).sum(1)
    return list(zip(q.tolist(), p.tolist(), strict=True))


def measured(squares: list[tuple[float, float]], **changes: int) -> NoiseScale:
    return estimate_noise_scale(squares, **{"micro_batches": MICRO, "rows": ROWS, **changes})


def test_the_ratio_of_means_over_100_windows() -> None:
    noises = [measured(gaussian(100, seed)) for seed in range(40)]
    values = [noise.value or 0.0 for noise in noises]
    assert 470 <= statistics.fmean(values) <= 532
    assert sum(470 <= value <= 532 for value in values) >= 34  # what 5 % to 95 % of such measurements lie between
    assert statistics.fmean(noise.squared_gradient for noise in noises) == pytest.approx(1, abs=0.02)
    assert statistics.fmean(noise.variance for noise in noises) == pytest.approx(500, abs=1)
    assert sum((noise.low or 0) <= 500 <= (noise.high or 0) for noise in noises) >= 34


def test_the_mean_of_ratios_would_be_far_off() -> None:
    squares = gaussian(4000, seed=1)
    ratios = [ROWS * MICRO * (q - p) / (MICRO * p - q) for q, p in squares if MICRO * p > q]
    assert statistics.fmean(ratios) > 650
    assert measured(squares).value == pytest.approx(500, rel=0.03)


def test_a_gradient_that_cannot_be_told_from_zero_gives_a_bound_and_no_number() -> None:
    refused = [noise for seed in range(30) if (noise := measured(gaussian(8, seed, scale=20_000))).value is None]
    assert len(refused) >= 20
    assert sum(noise.lower_bound <= 20_000 for noise in refused) >= len(refused) - 1
    assert all((noise.low, noise.high) == (None, None) and noise.lower_bound > 64 for noise in refused)
    assert refused[0].notes[0].startswith("|G|² is ")
    assert str(refused[0]).startswith("noise scale above ")


def test_one_window_by_hand() -> None:
    # Micro-gradients (3, 0) and (1, 0) of 4 rows: q = 5, p = 4, |G|² = 2·4 − 5 = 3, tr Σ = 4·2·(5 − 4) = 8.
    noise = estimate_noise_scale([(5.0, 4.0)] * 3, micro_batches=2, rows=4)
    assert (noise.squared_gradient, noise.variance, noise.value) == (3.0, 8.0, pytest.approx(8 / 3))
    assert (noise.low, noise.high) == (pytest.approx(8 / 3), pytest.approx(8 / 3))
    assert any("2 micro-gradients a window are few" in note for note in noise.notes)
    assert str(noise) == "noise scale 2.67 rows (2.67 – 2.67), by 3 windows of 2 × 4 rows"


def test_windows_that_are_not_finite_are_left_out_and_counted() -> None:
    good = gaussian(20, seed=3)
    noise = measured([*good, (math.inf, 1.0), (2.0, math.nan)])
    assert (noise.windows, noise.skipped, noise.value) == (20, 2, measured(good).value)
    assert any(note.startswith("2 of the windows had a gradient that was not finite") for note in noise.notes)


def test_the_caveats_are_told() -> None:
    notes = " ".join(measured(gaussian(20, seed=0)).notes)
    assert "an order of magnitude" in notes
    assert "a floor for now and no cap for later" in notes


@pytest.mark.parametrize(
    ("squares", "micro_batches", "message"),
    [
        ([(5.0, 4.0)] * 4, 1, "A window has 1 micro-gradient; noise shows only between two"),
        ([(5.0, 4.0)], 8, "1 of 1 windows had finite gradients"),
        ([(math.nan, 4.0)] * 3, 8, "0 of 3 windows had finite gradients"),
        ([(5.0, 5.0)] * 4, 8, "all alike"),
        ([(0.0, 0.0)] * 4, 8, "all alike"),
    ],
)
def test_what_cannot_be_estimated_is_refused(squares: list[tuple[float, float]], micro_batches: int, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        measured(squares, micro_batches=micro_batches)


@given(st.lists(st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=4, max_size=4), min_size=2, max_size=6))
def test_any_gradients_give_a_figure_within_its_interval_or_a_refusal(windows: list[list[list[float]]]) -> None:
    gradients = np.array(windows)
    q, p = (gradients**2).sum(2).mean(1), (gradients.mean(1) ** 2).sum(1)
    try:
        noise = estimate_noise_scale(list(zip(q.tolist(), p.tolist(), strict=True)), micro_batches=4, rows=2)
    except InvalidRequest:
        return
    assert noise.lower_bound >= 0
    if noise.value is not None:
        assert noise.low is not None
        assert noise.high is not None
        assert noise.low <= noise.value * (1 + 1e-9)
        assert noise.value <= noise.high * (1 + 1e-9)
        assert noise.lower_bound <= noise.value


def test_the_size_at_which_training_is_soonest_done() -> None:
    a, b, scale = 0.020, 0.0005, 2000
    assert soonest(a, b, scale) == pytest.approx(282.84, abs=0.005)
    assert min(range(1, 5000), key=lambda size: (1 + scale / size) * (a + b * size)) == 283
    overhead, per_micro, per_row, micro, ranks = 0.050, 0.020, 0.0005, 64, 4
    assert soonest(overhead, (per_micro / micro + per_row) / ranks, 8000) == pytest.approx(1403.3, abs=0.05)
    assert soonest(a, 0.0, scale) == math.inf


@pytest.mark.parametrize(("size", "share"), [(256, 1.0), (8192, 0.6578), (15_000, 0.5085), (65_536, 0.1894)])
def test_what_a_row_is_worth(size: int, share: float) -> None:
    assert efficiency(15_000, size, 256) == pytest.approx(share, abs=5e-5)


PLAN = BatchPlan(
    batch_size=4000, global_batch_size=4000, limited_by="memory", best=4000, exact=True, budget=1, cap=1, margin=0.0, device="cuda:0",
    throughput=Throughput(seconds_per_batch=0.020, seconds_per_sample=0.0005, residual=0.01, fastest=4000, fraction=0.95),
    notes=("what was there",),
)  # fmt: skip
NOISE = NoiseScale(
    value=2000.0, lower_bound=1500.0, low=1620.0, high=2420.0, windows=16, micro_batches=8, rows=8, squared_gradient=1.0,
    squared_gradient_error=0.1, variance=2000.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("noise", "changes", "said"),
    [
        ({}, {}, "binding now: convergence: beyond 283 rows a larger batch takes longer to a given loss; (1 + φ/B) × (a + bB), the time "
         "to a given loss, is least at 283 rows (255 – 311), an order of magnitude"),
        ({"value": 40_000.0}, {}, "binding now: throughput: from 760 rows on a larger batch is hardly faster"),
        ({"value": 40_000.0}, {"best": 500}, "binding now: memory: 500 rows fit"),
        ({"value": 40_000.0}, {"best": 500, "world_size": 2}, "binding now: memory: 1,000 rows fit"),
        ({"value": None, "low": None, "high": None, "lower_bound": 40_000.0}, {}, "binding now: throughput: from 760 rows"),
        ({"value": None, "low": None, "high": None}, {}, "whether convergence binds is not known; among the others, throughput"),
        ({}, {"throughput": None}, "what binds is not known"),
    ],
)  # fmt: skip
def test_a_plan_says_what_binds(noise: dict[str, float], changes: dict[str, int], said: str) -> None:
    plan = dataclasses.replace(PLAN, **changes)
    told = plan.with_noise_scale(dataclasses.replace(NOISE, **noise))
    assert any(note.startswith(said) for note in told.notes), told.notes
    assert told.notes[0] == "what was there"
    assert (told.batch_size, told.limited_by) == (plan.batch_size, "memory")
    assert BatchPlan.from_json(told.to_json()) == told


def test_a_plan_says_what_a_row_is_worth() -> None:
    notes = PLAN.with_noise_scale(NOISE).notes
    assert "a row in a global batch of 4,000 brings 38% of what it brings in one of 256 (Qiao et al. 2021, arXiv 2008.12260)" in notes
    small = dataclasses.replace(PLAN, batch_size=64, global_batch_size=64)
    assert not any("brings" in note for note in small.with_noise_scale(NOISE).notes)
