"""A plan's batches through a real DataLoader: which rows, in which optimizer step, and on from the middle of an epoch."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from autobatch.core.errors import InvalidRequest
from autobatch.core.plan import BatchPlan
from autobatch.core.schedule import Ramp


def plan_of(batch_size: int = 4, **changes: Any) -> BatchPlan:
    defaults: dict[str, Any] = {
        "global_batch_size": batch_size * changes.get("accumulation_steps", 1) * changes.get("world_size", 1), "lr": 0.1, "lr_scale": 1.0,
        "lr_rule": "linear", "base_lr": 0.1, "limited_by": "memory", "best": batch_size, "exact": True, "budget": 9, "cap": 9,
        "margin": 0.0, "device": "cpu",
    }  # fmt: skip
    return BatchPlan(batch_size=batch_size, **{**defaults, **changes})


def rows(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count))


def drawn(loader: Any) -> list[list[int]]:
    return [batch.tolist() for (batch,) in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(workers: int) -> None:
    sampler = plan_of().batch_sampler(rows(30))
    loader = DataLoader(rows(30), batch_sampler=sampler, num_workers=workers)
    assert len(loader) == 8
    first = drawn(loader)
    sampler.set_epoch(1)
    second = drawn(loader)
    assert [len(batch) for batch in first] == [4] * 7 + [2]
    for epoch in (first, second):
        assert sorted(itertools.chain(*epoch)) == list(range(30))
    assert first != second
    sampler.set_epoch(0)
    assert drawn(loader) == first


def test_unshuffled_and_without_the_incomplete_batch() -> None:
    sampler = plan_of().batch_sampler(rows(10), shuffle=False, drop_last=True)
    assert drawn(DataLoader(rows(10), batch_sampler=sampler)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(plan_of(drop_last=True).batch_sampler(rows(10))) == 2


def test_ranks_share_an_epoch_out() -> None:
    plan = plan_of(world_size=3)
    parts = [list(plan.batch_sampler(rows(24), rank=rank, seed=5)) for rank in range(3)]
    assert sorted(itertools.chain(*itertools.chain(*parts))) == list(range(24))
    with pytest.raises(InvalidRequest, match="The plan is for 3 ranks, and torch.distributed is not started"):
        plan.batch_sampler(rows(24))
    with pytest.raises(InvalidRequest, match="rank is 3; the plan has ranks 0 to 2"):
        plan.batch_sampler(rows(24), rank=3)


def test_a_ramp_says_how_many_batches_make_an_optimizer_step_and_its_learning_rate() -> None:
    sampler = plan_of(accumulation_steps=4).batch_sampler(rows(64), "0:4 8:8 24:16", shuffle=False)
    assert (sampler.global_batch_size, sampler.lr_scale) == (4, 0.25)
    steps = []
    for index, _ in enumerate(DataLoader(rows(64), batch_sampler=sampler)):
        window = sampler.window(index)
        assert (sampler.global_batch_size, sampler.lr_scale) == (window.global_batch_size, window.lr_scale)
        if index == window.last:
            steps.append((window.samples, window.batches, window.global_batch_size, window.lr_scale))
    assert steps == [(0, 1, 4, 0.25), (4, 1, 4, 0.25), (8, 2, 8, 0.5), (16, 2, 8, 0.5), (24, 4, 16, 1), (40, 4, 16, 1), (56, 2, 16, 1)]


def test_a_ramp_goes_on_over_epochs() -> None:
    sampler = plan_of(accumulation_steps=2).batch_sampler(rows(10), "0:4 20:8")
    sizes = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        sizes.append([sampler.window(index).global_batch_size for index, _ in enumerate(sampler)])
    assert sizes == [[4, 4, 4], [4, 4, 4], [8, 8, 8]]
    with pytest.raises(IndexError, match="the epoch has 3 batches, none with index 3"):
        sampler.window(3)


@pytest.mark.parametrize(
    ("rule", "noise_scale", "scales"),
    [("linear", None, [0.25, 1, 2]), ("sqrt", None, [0.5, 1, 2**0.5]), ("none", None, [1, 1, 1]), ("noise", 16.0, [0.4, 1, 4 / 3])],
)
def test_the_learning_rate_of_a_stage_follows_the_plans_rule(rule: str, noise_scale: float | None, scales: list[float]) -> None:
    plan = plan_of(accumulation_steps=4, lr_rule=rule, noise_scale=noise_scale)
    sampler = plan.batch_sampler(rows(64), Ramp.parse("0:4 8:16 40:32"))
    found = dict.fromkeys(sampler.window(index).lr_scale for index in range(len(sampler)))
    assert list(found) == pytest.approx(list(dict.fromkeys(scales)))


@pytest.mark.parametrize(
    ("changes", "ramp", "message"),
    [
        ({}, "0:4 8:6", "The ramp's batch of 6 rows is no multiple of the 4 rows that all devices run at once: the nearest are 4 and 8"),
        ({"world_size": 2}, "0:4 8:8", "batch of 4 rows is no multiple of the 8 rows that all devices run at once: the nearest are 8. For"),
        ({}, "0:8 8:4", "The ramp goes from 8 to 4 rows"),
        ({"accumulation_steps": 4}, (4, 5, 100), "increments of 5 do not add up to 16: the nearest are 14 and 19"),
        ({"lr_rule": "mine"}, "0:4 8:8", "learning-rate rule is mine, which says nothing about the ramp's batch of 8 rows"),
        ({"lr_rule": None, "lr": None}, "0:8", "learning-rate rule is none at all"),
    ],
)
def test_a_ramp_that_cannot_be_run_is_refused_before_the_first_batch(changes: dict[str, Any], ramp: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        plan_of(**changes).batch_sampler(rows(64), ramp, rank=0)


def test_the_older_form_ends_at_the_plans_global_batch_and_tokens_are_counted_in_samples() -> None:
    plan = plan_of(accumulation_steps=4)
    assert plan.batch_sampler(rows(64), (4, 4, 90)).ramp == Ramp.steps(4, 4, 90, 16)
    assert plan.batch_sampler(rows(64), "0:4 1K:16", tokens_per_sample=100).ramp == Ramp.parse("0:4 10:16")


def test_rows_without_a_number_are_refused() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(4))

    with pytest.raises(InvalidRequest, match="has no length"):
        plan_of().batch_sampler(Stream())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 40), st.booleans(), st.booleans())
def test_a_run_stopped_anywhere_goes_on_with_exactly_the_same_batches(
    count: int, world_size: int, stop: int, shuffle: bool, drop_last: bool
) -> None:
    plan = plan_of(2, world_size=world_size, accumulation_steps=3)
    ramp = Ramp.parse(f"0:{2 * world_size} 15:{6 * world_size}")
    epochs = 3

    def build() -> Any:
        return plan.batch_sampler(rows(count), ramp, shuffle=shuffle, drop_last=drop_last, rank=world_size - 1, seed=3)

    def run(sampler: Any, begin: int, limit: int) -> list[Any]:
        seen: list[Any] = []
        for epoch in range(begin, epochs):
            sampler.set_epoch(epoch)
            if len(seen) >= limit:
                break
            for batch in DataLoader(rows(count), batch_sampler=sampler):
                seen.append((epoch, batch[0].tolist(), sampler.window()))
                if len(seen) >= limit:
                    return seen
        return seen

    whole = run(build(), 0, 10**6)
    stopped = build()
    head = run(stopped, 0, stop) if stop else []
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = build()
    resumed.load_state_dict(state)
    assert head + run(resumed, state["epoch"], 10**6) == whole


def test_with_workers_the_state_is_of_what_was_trained_on() -> None:
    def loader_of(sampler: Any) -> DataLoader[Any]:
        return DataLoader(rows(40), batch_sampler=sampler, num_workers=1, prefetch_factor=4)

    whole = drawn(loader_of(plan_of().batch_sampler(rows(40))))
    sampler = plan_of().batch_sampler(rows(40))
    taken = []
    for index, (batch,) in enumerate(loader_of(sampler)):
        taken.append(batch.tolist())
        if index == 2:
            state = sampler.state_dict(batches=index + 1)
            break
    resumed = plan_of().batch_sampler(rows(40))
    resumed.load_state_dict(state)
    assert taken + drawn(loader_of(resumed)) == whole


def test_a_state_of_another_run_is_refused_with_what_differs() -> None:
    state = plan_of().batch_sampler(rows(40)).state_dict()
    with pytest.raises(InvalidRequest, match="rows 40 there and 39 here, seed 0 there and 1 here. Resume with"):
        plan_of().batch_sampler(rows(39), seed=1).load_state_dict(state)
