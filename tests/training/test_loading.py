"""Loaders for a plan: what is kept of the user's own, what fits the host, and that every argument can be replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from autobatch.core.errors import InvalidRequest
from autobatch.core.plan import BatchPlan
from autobatch.core.units import GIB, MIB
from autobatch.training.loading import work_ahead

ROWS = TensorDataset(torch.arange(20))


class Pictures(Dataset[Any]):
    """Rows that draw random numbers when they are read, as augmentation does."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.rand(3, 8, 8), index


def plan_of(batch_size: int = 8, **changes: Any) -> BatchPlan:
    defaults: dict[str, Any] = {
        "global_batch_size": batch_size, "limited_by": "memory", "best": batch_size, "exact": True, "budget": 9, "cap": 9, "margin": 0.0,
        "device": "cpu",
    }  # fmt: skip
    return BatchPlan(batch_size=batch_size, **{**defaults, **changes})


def sizes(loader: DataLoader[Any]) -> list[int]:
    return [len(batch[0]) for batch in loader]


def collate(items: list[Any]) -> list[Any]:
    return [torch.stack([item[0] for item in items]), "mine"]


def seed_worker(_: int) -> None:
    """Stand for a user's seeding of workers."""


def test_a_data_set_is_shuffled_into_the_plans_batches() -> None:
    loader = plan_of().dataloader(ROWS)
    assert sizes(loader) == [8, 8, 4]
    order = [row for (batch,) in loader for row in batch.tolist()]
    assert sorted(order) == list(range(20)) != order
    assert sizes(plan_of(drop_last=True).dataloader(ROWS)) == [8, 8]


def test_its_note_says_why_there_are_no_workers() -> None:
    loader: Any = plan_of().dataloader(ROWS)
    assert (loader.num_workers, loader.autobatch_note) == (0, "no workers: the rows lie in memory already")
    loader = plan_of().dataloader(Pictures())
    assert loader.num_workers == 0
    assert loader.autobatch_note == "no workers: training itself uses the processor's cores; num_workers= asks for some"


def test_a_users_loader_keeps_everything_but_its_batch_size() -> None:
    generator = torch.Generator().manual_seed(7)
    own = DataLoader(
        Pictures(), batch_size=2, shuffle=True, collate_fn=collate, generator=generator, worker_init_fn=seed_worker, num_workers=1,
        drop_last=True,
    )  # fmt: skip
    loader: Any = plan_of().dataloader(own)
    assert (loader.batch_size, loader.num_workers, loader.drop_last, loader.worker_init_fn) == (8, 1, True, seed_worker)
    assert (loader.collate_fn, loader.generator, loader.sampler) == (collate, generator, own.sampler)
    assert [batch[1] for batch in loader] == ["mine", "mine"]
    assert loader.autobatch_note.startswith("1 worker, each 2 ahead, hold ")


def test_what_only_workers_have_goes_with_them() -> None:
    own = DataLoader(Pictures(), batch_size=2, num_workers=2, prefetch_factor=3, persistent_workers=True, timeout=60)
    loader: Any = plan_of().dataloader(own)
    assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers, loader.timeout) == (2, 3, True, 60)
    without: Any = plan_of().dataloader(own, num_workers=0)
    assert sizes(without) == [8, 8, 4]


def test_a_sampler_of_the_users_stays_and_so_does_no_shuffling() -> None:
    weighted = WeightedRandomSampler([1.0] * 20, 40)
    assert sizes(plan_of().dataloader(DataLoader(ROWS, sampler=weighted))) == [8] * 5
    in_order = plan_of().dataloader(DataLoader(ROWS, batch_size=2))
    assert [row for (batch,) in in_order for row in batch.tolist()] == list(range(20))
    assert isinstance(plan_of().dataloader(ROWS, shuffle=False).sampler, SequentialSampler)


def test_a_seeded_generator_gives_the_order_it_gives_in_a_plain_loader() -> None:
    def order(loader: DataLoader[Any]) -> list[int]:
        return [row for (batch,) in loader for row in batch.tolist()]

    plain = DataLoader(ROWS, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3))
    assert order(plan_of().dataloader(ROWS, generator=torch.Generator().manual_seed(3))) == order(plain)


def test_weighing_a_row_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    plan_of().dataloader(DataLoader(Pictures(), batch_size=2, num_workers=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_argument_can_be_replaced() -> None:
    loader: Any = plan_of().dataloader(ROWS, batch_size=5, num_workers=2, prefetch_factor=3, drop_last=True, shuffle=False)
    assert (loader.batch_size, loader.num_workers, loader.prefetch_factor, loader.drop_last) == (5, 2, 3, True)
    assert loader.autobatch_note == "2 workers, as asked for"
    assert sizes(plan_of().dataloader(ROWS, sampler=SequentialSampler(range(9)))) == [8, 1]
    plan = plan_of()
    sampler = plan.batch_sampler(ROWS)
    assert plan.dataloader(ROWS, batch_sampler=sampler).batch_sampler is sampler
    assert plan.dataloader(DataLoader(ROWS), batch_sampler=sampler).batch_sampler is sampler


def test_ranks_have_their_shares() -> None:
    plan = plan_of(world_size=3)
    loaders = [plan.dataloader(ROWS, rank=rank, seed=1) for rank in range(3)]
    assert all(isinstance(loader.sampler, DistributedSampler) for loader in loaders)
    drawn = [row for loader in loaders for (batch,) in loader for row in batch.tolist()]
    assert (len(drawn), set(drawn)) == (21, set(range(20)))
    cut = [plan_of(world_size=3, drop_last=True).dataloader(ROWS, rank=rank) for rank in range(3)]
    assert [sum(sizes(loader)) for loader in cut] == [0, 0, 0]  # 6 rows a rank make no batch of 8
    with pytest.raises(InvalidRequest, match="torch.distributed is not started"):
        plan.dataloader(ROWS)


def test_a_stream_is_batched_as_it_comes() -> None:
    class Stream(IterableDataset[torch.Tensor]):
        def __iter__(self) -> Any:
            return iter(torch.arange(10))

    assert [len(batch) for batch in plan_of().dataloader(Stream())] == [8, 2]


def test_a_loader_with_batches_of_its_own_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="makes its batches with a batch_sampler of its own"):
        plan_of().dataloader(DataLoader(ROWS, batch_sampler=[[0, 1], [2]]))


def test_workers_are_cut_to_what_the_host_has() -> None:
    fits = work_ahead(100 * MIB, 8, 4 * GIB, pinned=False)
    assert (fits.workers, fits.prefetch) == (8, 2)
    assert fits.why == "8 workers, each 2 ahead, hold 2.44 GiB at 100.0 MiB a batch; 4.00 GiB may be used"
    pinned = work_ahead(100 * MIB, 8, 5 * GIB, pinned=True)
    assert (pinned.workers, pinned.prefetch) == (8, 2)
    less = work_ahead(100 * MIB, 8, 2 * GIB, pinned=False)
    assert (less.workers, less.prefetch) == (8, 1)
    assert less.why == "8 workers, each 1 ahead, hold 1.66 GiB at 100.0 MiB a batch; 2.00 GiB may be used (cut from 8, each 2 ahead)"
    none = work_ahead(3 * GIB, 8, 2 * GIB, pinned=False)
    assert (none.workers, none.prefetch, none.why) == (0, None, "no workers; 3.00 GiB a batch leave no room for workers in 2.00 GiB")


@given(st.integers(0, 2**32), st.integers(0, 16), st.integers(0, 2**36), st.booleans(), st.integers(1, 5))
def test_what_workers_hold_never_exceeds_what_there_is(size: int, workers: int, available: int, pinned: bool, prefetch: int) -> None:
    ahead = work_ahead(size, workers, available, pinned=pinned, prefetch=prefetch)
    assert ahead.workers <= workers
    if ahead.workers:
        assert ahead.prefetch is not None
        copies = 2 if pinned else 1
        assert size * (1 + ahead.workers * (1 + ahead.prefetch * copies)) <= available
    elif workers:
        assert size * (1 + 1 + (2 if pinned else 1)) > available
