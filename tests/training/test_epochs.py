"""Iterations, updates and rows of an epoch, against torch's own samplers and loader."""

from __future__ import annotations

import collections

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from autobatch.core.epochs import epoch
from autobatch.core.errors import InvalidRequest
from autobatch.core.options import PlanRequest, SearchOptions
from autobatch.core.plan import BatchPlan, make_plan
from autobatch.core.records import MemoryReading, Outcome, Probe, SearchSpace, Setting


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 6), st.integers(1, 5), st.booleans(), st.booleans())
def test_an_epoch_is_what_torch_makes_of_it(
    rows: int, batch_size: int, world_size: int, accumulation: int, drop_last: bool, sampler_drops: bool
) -> None:
    dataset = TensorDataset(torch.arange(rows))
    drawn = collections.Counter[int]()
    for rank in range(world_size):
        sampler = DistributedSampler(dataset, world_size, rank, shuffle=False, drop_last=sampler_drops)
        loader = DataLoader(dataset, batch_size, sampler=sampler, drop_last=drop_last)
        batches = [batch.tolist() for (batch,) in loader]
        drawn.update(row for batch in batches for row in batch)
        updates = sum(index % accumulation == accumulation - 1 or index == len(batches) - 1 for index in range(len(batches)))
        told = epoch(
            rows, batch_size, world_size=world_size, accumulation_steps=accumulation, drop_last=drop_last, sampler_drop_last=sampler_drops
        )
        assert (told.iterations, told.updates) == (len(batches), updates)
        assert told.last_batch_size == (len(batches[-1]) if batches else 0)
        assert told.rows == sum(map(len, batches))
    assert told.repeated == sum(drawn.values()) - len(drawn)
    assert told.left_out == rows - len(drawn)


@pytest.mark.parametrize(
    ("batch", "world", "updates"),
    [(256, 1, 5005), (1024, 8, 157)],
)
def test_imagenets_published_steps(batch: int, world: int, updates: int) -> None:
    assert epoch(1_281_167, batch, world_size=world).updates == updates
    assert 90 * updates == {5005: 450_450, 157: 14_130}[updates]


def test_ten_rows_on_four_ranks() -> None:
    padded, cut = (epoch(10, 1, world_size=4, drop_last=drop) for drop in (False, True))
    assert (padded.rows, padded.repeated, padded.left_out) == (3, 2, 0)
    assert (cut.rows, cut.repeated, cut.left_out) == (2, 0, 2)


def test_a_count_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="batch_size is 0"):
        epoch(10, 0)


def plan_of(batch_size: int, request: PlanRequest) -> BatchPlan:
    reading = MemoryReading(capacity=100, free=100)
    setting = Setting(device="cpu", device_description="CPU", reading=reading, budget=100, cap=95, margin=0.05, has_batch_norm=True)
    return make_plan(
        setting=setting, request=request, space=SearchSpace(), batch_size=batch_size, best=batch_size, wall=None, wall_kind=None,
        probes=[Probe(batch_size=batch_size, outcome=Outcome.FIT)], limited_by="memory", exact=True,
    )  # fmt: skip


def test_drop_last_leaves_out_the_batch_of_one_that_batch_norm_cannot_have() -> None:
    kept, dropped = (plan_of(100, PlanRequest(dataset_size=1001, epochs=2, drop_last=drop)) for drop in (False, True))
    assert (kept.iterations_per_epoch, kept.last_batch_size, kept.total_steps) == (11, 1, 22)
    assert (dropped.iterations_per_epoch, dropped.last_batch_size, dropped.total_steps) == (10, 100, 20)
    assert any("the last batch of an epoch has 1 row" in note for note in kept.notes)
    assert not any("the last batch" in note for note in dropped.notes)


def test_rows_that_several_ranks_draw_twice_are_told() -> None:
    plan = plan_of(5, PlanRequest(dataset_size=10, world_size=4))
    told = "10 rows over 4 devices: DistributedSampler repeats 2 rows an epoch so that all have 3; drop_last=True leaves out 2 instead"
    assert told in plan.notes
    assert not any("DistributedSampler" in note for note in plan_of(5, PlanRequest(dataset_size=12, world_size=4)).notes)


def test_a_batch_never_exceeds_what_a_device_has_of_the_data_set() -> None:
    options = SearchOptions()
    assert options.space(PlanRequest(dataset_size=10, world_size=4)).last == 3
    assert options.space(PlanRequest(dataset_size=10, world_size=4, drop_last=True)).last == 2
    with pytest.raises(InvalidRequest, match="With drop_last, the 10 rows that the data set has for a device make no batch of 16"):
        SearchOptions(min_batch_size=16).space(PlanRequest(dataset_size=10, drop_last=True))
