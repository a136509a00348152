"""Ramps: the published forms, what they refuse, and the optimizer steps of an epoch."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.core.errors import InvalidRequest
from autobatch.core.schedule import Ramp, Stage, warmup_steps, windows


def stages(ramp: Ramp) -> list[tuple[int, int]]:
    return [(stage.start, stage.global_batch_size) for stage in ramp.stages]


def test_megatrons_documented_ramp_has_126_increments() -> None:
    ramp = Ramp.steps(16, 8, 300_000, 1024)
    assert len(ramp.stages) - 1 == 126
    assert stages(ramp)[:3] == [(0, 16), (2381, 24), (4762, 32)]  # 300,000 / 126 = 2,380.95 samples each
    assert stages(ramp)[-1] == (300_000, 1024)
    assert (ramp.updates(1_000_000), Ramp.constant(1024).updates(1_000_000)) == (2003, 977)


@given(st.integers(1, 64), st.integers(1, 16), st.integers(0, 40), st.integers(0, 3000))
def test_the_batch_after_so_many_samples_is_megatrons(start: int, increment: int, count: int, seen: int) -> None:
    samples, end = 2000, start + count * increment
    ramp = Ramp.steps(start, increment, samples, end)
    expected = end if seen >= samples or count == 0 else start + seen * count // samples * increment
    assert ramp.at(seen).global_batch_size == expected


def test_the_newer_form_in_samples_and_in_tokens() -> None:
    assert stages(Ramp.parse("0:768 1.5K:1536 3M:3072")) == [(0, 768), (1500, 1536), (3_000_000, 3072)]
    assert stages(Ramp.parse("0:768 250B:1536", tokens_per_sample=4096)) == [(0, 768), (61_035_157, 1536)]
    assert stages(Ramp.parse("0:1 1t:2")) == [(0, 1), (10**12, 2)]


def test_doubling() -> None:
    assert stages(Ramp.doubling(1024, 4096, 503_000)) == [(0, 1024), (251_500, 2048), (503_000, 4096)]
    assert stages(Ramp.doubling(64, 200, 90)) == [(0, 64), (45, 128), (90, 200)]
    assert stages(Ramp.doubling(64, 64, 90)) == [(0, 64)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ramp.parse("0:768 1M:512"), r"The ramp goes from 768 to 512 rows at 1,000,000 samples; it may only grow"),
        (lambda: Ramp.parse("0:768 1M:768"), "from 768 to 768 rows"),
        (lambda: Ramp.parse("0:768 1M:1000 1M:2000"), "begins at 1,000,000 samples, the one before at 1,000,000: put them in order"),
        (lambda: Ramp.parse("5:768"), "first stage begins at 0 samples; the first begins at 5"),
        (lambda: Ramp.parse(""), "there is none"),
        (lambda: Ramp.parse("0:0"), "A ramp begins with a batch of 0"),
        (lambda: Ramp.parse("0=768"), "'0=768' is no stage of a ramp"),
        (lambda: Ramp.parse("0:768 -5:800"), "'-5:800' is no stage"),
        (lambda: Ramp.parse("0:8", tokens_per_sample=0), "tokens_per_sample is 0"),
        (lambda: Ramp.steps(16, 10, 1000, 1024), "From 16 rows, increments of 10 do not add up to 1,024: the nearest are 1,016 and 1,026"),
        (lambda: Ramp.steps(1024, 8, 1000, 16), "The ramp goes from 1,024 down to 16 rows"),
        (lambda: Ramp.steps(16, 0, 1000, 1024), "increment is 0"),
        (lambda: Ramp.steps(16, 8, 3, 1024), "put them in order"),
        (lambda: Ramp.doubling(1024, 16, 1000), "down to 16 rows"),
        (lambda: Ramp.doubling(2, 16, True), "samples is True"),
        (lambda: warmup_steps(-1, 8), "A warm-up of -1 samples"),
    ],
)
def test_what_is_no_ramp_is_refused(make: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make()  # type: ignore[operator]


def test_a_stage_that_devices_cannot_run_names_the_nearest_that_they_can() -> None:
    Ramp.parse("0:64 1K:128").check_multiple(64)
    with pytest.raises(InvalidRequest) as caught:
        Ramp.parse("0:64 1K:100").check_multiple(64)
    assert str(caught.value) == (
        "The ramp's batch of 100 rows is no multiple of the 64 rows that all devices run at once: the nearest are 64 and 128. "
        "For smaller steps, plan with a smaller max_batch_size."
    )
    with pytest.raises(InvalidRequest, match="the nearest are 64. For"):
        Ramp.parse("0:32").check_multiple(64)


def test_warm_up_steps_are_counted_in_samples() -> None:
    assert (warmup_steps(0, 512), warmup_steps(1, 512), warmup_steps(5 * 1437, 512)) == (0, 1, 15)


@given(st.integers(1, 200), st.integers(1, 8), st.integers(0, 5000), st.lists(st.integers(1, 500), max_size=4, unique=True))
def test_windows_share_out_an_epoch(batches: int, rows: int, seen: int, starts: list[int]) -> None:
    sizes = itertools.accumulate([rows, *(rows * (1 + start % 3) for start in starts)])
    ramp = Ramp(tuple(Stage(start=s, global_batch_size=b) for s, b in zip([0, *sorted(starts)], sizes, strict=True)))
    found = list(windows(ramp, batches=batches, rows=rows, seen=seen, lr_scale=float))
    assert [index for window in found for index in range(window.first, window.last + 1)] == list(range(batches))
    for window in found:
        stage = ramp.at(seen + window.first * rows)
        assert (window.global_batch_size, window.lr_scale) == (stage.global_batch_size, float(stage.global_batch_size))
        assert window.batches * rows == stage.global_batch_size or window is found[-1]
