"""The records: what they derive, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.core.errors import InvalidRequest
from autobatch.core.options import PlanRequest
from autobatch.core.records import MemoryReading, Outcome, Peak, Probe, SearchSpace


def test_only_a_clean_fit_may_be_returned_and_four_outcomes_are_a_wall() -> None:
    assert [o for o in Outcome if o.fits] == [Outcome.FIT]
    assert [o.value for o in Outcome if o.bounds] == ["tight", "oom", "host_oom", "kernel_limit"]


def test_a_probe_reports_the_higher_of_its_two_phases() -> None:
    probe = Probe(
        batch_size=8,
        outcome=Outcome.FIT,
        forward_backward=Peak(allocated=300, reserved=400),
        optimizer=Peak(allocated=350, reserved=380),
        seconds_per_step=0.5,
    )
    assert (probe.peak_allocated, probe.peak_reserved, probe.samples_per_second) == (350, 400, 16.0)


def test_what_a_probe_did_not_measure_is_none() -> None:
    probe = Probe(batch_size=8, outcome=Outcome.OOM)
    assert (probe.peak_allocated, probe.peak_reserved, probe.samples_per_second) == (None, None, None)
    forward_only = dataclasses.replace(probe, forward_backward=Peak(allocated=300))
    assert (forward_only.peak_allocated, forward_only.peak_reserved) == (300, None)


def test_records_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SearchSpace().max = 3  # type: ignore[misc]


def test_obtainable_is_what_is_free_and_what_is_held_already() -> None:
    assert MemoryReading(capacity=100, free=60, held=30).obtainable == 90
    assert MemoryReading(capacity=100, free=80, held=30).obtainable == 100


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 64))
def test_the_first_and_last_sizes_are_the_outermost_permitted_multiples(low: int, high: int, multiple_of: int) -> None:
    sizes = [size for size in range(low, high + 1) if size % multiple_of == 0]
    if sizes:
        space = SearchSpace(min=low, max=high, multiple_of=multiple_of)
        assert (space.first, space.last) == (sizes[0], sizes[-1])
    else:
        with pytest.raises(InvalidRequest):
            SearchSpace(min=low, max=high, multiple_of=multiple_of)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min": 0}, "min_batch_size is 0; a batch has at least one row. Give min_batch_size of 1 or more."),
        ({"max": -4}, "max_batch_size is -4; a batch has at least one row. Give max_batch_size of 1 or more."),
        ({"max": 2.5}, "max_batch_size is 2.5; a whole number of rows is wanted, for example 32."),
        ({"multiple_of": True}, "multiple_of is True; a whole number of rows is wanted, for example 32."),
        ({"min": 9, "max": 8}, "min_batch_size 9 is above max_batch_size 8: no size lies between."),
        ({"multiple_of": 64, "max": 32}, "No multiple of 64 lies between 1 and 32. Lower multiple_of or raise max_batch_size"),
        ({"tolerance": 1}, "tolerance is 1; a fraction from 0 (exact) to below 1 is wanted, for example 0.01."),
        ({"tolerance": math.nan}, "tolerance is nan; a fraction from 0 (exact) to below 1 is wanted, for example 0.01."),
    ],
)
def test_a_space_with_nothing_in_it_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SearchSpace(**options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_batch_size": 0}, "base_batch_size is 0; a whole number of 1 or more is wanted."),
        ({"global_batch_size": -1}, "global_batch_size is -1; a whole number of 1 or more is wanted."),
        ({"dataset_size": 0}, "dataset_size is 0; a whole number of 1 or more is wanted."),
        ({"epochs": 1.5}, "epochs is 1.5; a whole number of 1 or more is wanted."),
        ({"world_size": True}, "world_size is True; a whole number of 1 or more is wanted."),
        ({"base_lr": 0}, "base_lr is 0; a learning rate above zero is wanted, for example 0.1."),
        ({"base_lr": math.inf}, "base_lr is inf; a learning rate above zero is wanted, for example 0.1."),
        ({"base_lr": "0.1"}, "base_lr is '0.1'; a learning rate above zero is wanted, for example 0.1."),
        ({"objective": "speed"}, "objective is 'speed'; known: memory, throughput."),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        PlanRequest(**options)
    assert str(caught.value) == message


def test_the_targets_defaults_fill_only_what_the_user_left_out() -> None:
    request = PlanRequest(base_lr=0.2).with_defaults({"base_lr": 0.1, "epochs": 90, "precision": "bf16"})
    assert request == PlanRequest(base_lr=0.2, epochs=90)
    with pytest.raises(InvalidRequest, match="epochs is 0"):
        PlanRequest().with_defaults({"epochs": 0})
