"""A ``DataLoader`` with the plan's batch size, and as many workers and batches ahead as the host has memory for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader as DataLoader
from torch.utils.data import (
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from autobatch.core.errors import InvalidRequest
from autobatch.core.units import counted, format_bytes
from autobatch.devices.host import host_memory
from autobatch.training.ramps import this_rank
from autobatch.workload.batches import host_bytes
from autobatch.workload.randomness import keep_random_state

if TYPE_CHECKING:
    from autobatch.core.plan import BatchPlan

# More workers than this hardly ever load faster.
_MOST_WORKERS = 8
_PREFETCH = 2
# The share of the host's free memory that batches ahead may take; the rest is for the training process and the workers themselves.
_SHARE = 0.5
_SHARED_MEMORY = Path("/dev/shm")
# What torch takes only together with workers.
_FOR_WORKERS = ("timeout", "multiprocessing_context", "persistent_workers", "prefetch_factor")
# What a loader of the user's keeps when its batch size changes.
_KEPT = ("collate_fn", "generator", "worker_init_fn", "pin_memory_device", *_FOR_WORKERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """How a loader works ahead.

    Attributes:
        workers: worker processes.
        prefetch: batches each of them has ready, ``None`` without workers.
        why: how that came about, in a sentence.
    """

    workers: int
    prefetch: int | None
    why: str


def work_ahead(batch_bytes: int, workers: int, available: int, *, pinned: bool, prefetch: int = _PREFETCH) -> Ahead:
    """Return the most workers and batches ahead, up to those given, that fit into ``available`` bytes.

    A worker holds one batch that it is making and ``prefetch`` that wait; pinned, those that wait are there twice.
    """
    wanted = workers, prefetch

    def needed() -> int:
        return batch_bytes * (1 + workers * (1 + prefetch * (2 if pinned else 1)))

    while workers and needed() > available:
        workers, prefetch = (workers, prefetch - 1) if prefetch > 1 else (workers - 1, prefetch)
    size = f"{format_bytes(batch_bytes)} a batch"
    if not workers:
        held = f"; {size} leave no room for workers in {format_bytes(available)}" if wanted[0] else ""
        return Ahead(workers=0, prefetch=None, why=f"no workers{held}")
    ahead = f"{counted(workers, 'worker')}, each {prefetch} ahead, hold {format_bytes(needed())} at {size}"
    less = "" if (workers, prefetch) == wanted else f" (cut from {wanted[0]}, each {wanted[1]} ahead)"
    return Ahead(workers=workers, prefetch=prefetch, why=f"{ahead}; {format_bytes(available)} may be used{less}")


def dataloader(plan: BatchPlan, dataset: Any, *, rank: int | None = None, seed: int = 0, **options: Any) -> DataLoader[Any]:
    """Return a loader of the plan's batches; see ``BatchPlan.dataloader``."""
    kept = _kept(dataset) if isinstance(dataset, DataLoader) else {}
    rows: Any = dataset.dataset if isinstance(dataset, DataLoader) else dataset
    pinned = plan.device.startswith("cuda") and torch.cuda.is_available()
    chosen = {"batch_size": plan.batch_size, "drop_last": plan.drop_last, "pin_memory": pinned, **kept}
    if "batch_sampler" in options:
        chosen = {name: value for name, value in chosen.items() if name not in ("batch_size", "drop_last", "sampler")}
    elif "sampler" not in options and not isinstance(rows, IterableDataset):
        chosen["sampler"] = _sampler(plan, rows, kept.get("sampler"), rank, seed, {**chosen, **options})
        options.pop("shuffle", None)
    workers = chosen.pop("num_workers", None)
    if "num_workers" in options:
        asked = options["num_workers"]
        ahead = Ahead(workers=asked, prefetch=chosen.get("prefetch_factor"), why=f"{counted(asked, 'worker')}, as asked for")
    else:
        ahead = _ahead(plan, rows, {**chosen, **options}, workers)
    chosen |= {"num_workers": ahead.workers, "prefetch_factor": ahead.prefetch}
    if not ahead.workers:
        chosen = {name: value for name, value in chosen.items() if name not in _FOR_WORKERS}
    loader: DataLoader[Any] = DataLoader(rows, **{**chosen, **options})
    loader.autobatch_note = ahead.why
    return loader


def _kept(loader: DataLoader[Any]) -> dict[str, Any]:
    """Return the options of a user's loader that do not depend on the batch size."""
    if loader.batch_size is None:
        raise InvalidRequest(
            "The DataLoader makes its batches with a batch_sampler of its own, so its batch size cannot be changed. "
            "Give the data set, or batch_sampler=plan.batch_sampler(dataset)."
        )
    kept = {name: getattr(loader, name) for name in _KEPT if getattr(loader, name, None)}
    if not isinstance(loader.dataset, IterableDataset):
        kept["sampler"] = loader.sampler
    return kept | {"pin_memory": loader.pin_memory, "drop_last": loader.drop_last, "num_workers": loader.num_workers}


def _sampler(plan: BatchPlan, dataset: Any, own: Any, rank: int | None, seed: int, options: dict[str, Any]) -> Any:
    """Return the user's own sampler where it is more than an order; else one for this rank, shuffled unless that is unwanted."""
    if own is not None and type(own) not in (RandomSampler, SequentialSampler):
        return own
    shuffle = options.get("shuffle", type(own) is not SequentialSampler)
    if plan.world_size > 1:
        ranks = {"num_replicas": plan.world_size, "rank": this_rank(plan, rank)}
        return DistributedSampler(dataset, **ranks, shuffle=shuffle, seed=seed, drop_last=options["drop_last"])
    if own is not None and "shuffle" not in options:
        return own
    return RandomSampler(dataset, generator=options.get("generator")) if shuffle else SequentialSampler(dataset)


def _ahead(plan: BatchPlan, dataset: Dataset[Any], options: dict[str, Any], workers: int | None) -> Ahead:
    """Return how far the host's memory and cores let a loader work ahead."""
    if workers is None:
        if isinstance(dataset, TensorDataset):
            return Ahead(workers=0, prefetch=None, why="no workers: the rows lie in memory already")
        if plan.device.startswith("cpu"):
            return Ahead(workers=0, prefetch=None, why="no workers: training itself uses the processor's cores; num_workers= asks for some")
        workers = min(_MOST_WORKERS, max(0, _cores() // _ranks_here(plan) - 1))
    if isinstance(dataset, IterableDataset):
        prefetch = _PREFETCH if workers else None
        return Ahead(workers=workers, prefetch=prefetch, why=f"{counted(workers, 'worker')}: rows of a stream are not read to be weighed")
    pinned = bool(options.get("pin_memory"))
    size = _row_bytes(dataset, options.get("collate_fn") or default_collate) * plan.batch_size
    return work_ahead(size, workers, _available() // _ranks_here(plan), pinned=pinned, prefetch=options.get("prefetch_factor") or _PREFETCH)


def _row_bytes(dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> int:
    """Return the bytes of one row as the loader hands it over; random numbers that reading it draws are put back."""
    with keep_random_state(dataset, collate):
        return host_bytes(collate([dataset[0]]))


def _available() -> int:
    """Return the bytes that batches ahead may take: of free memory, and of the shared memory through which workers hand them over."""
    free = int(_SHARE * host_memory().free)
    return min(free, shutil.disk_usage(_SHARED_MEMORY).free) if _SHARED_MEMORY.is_dir() else free


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ranks_here(plan: BatchPlan) -> int:
    """Return the ranks that share this host: what torchrun says, else as many as there are devices for."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(told) if told.isdigit() and int(told) else min(plan.world_size, max(1, torch.cuda.device_count()))
