"""Batches of row indices for a ``DataLoader``, grouped into optimizer steps as a ramp of the global batch size asks for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.utils.data import BatchSampler, DistributedSampler, IterableDataset, Sampler

from autobatch.core.epochs import epoch
from autobatch.core.errors import InvalidRequest
from autobatch.core.learning_rate import RULES, scale
from autobatch.core.schedule import Ramp, Window, windows

if TYPE_CHECKING:
    from autobatch.core.plan import BatchPlan

RampLike = Ramp | str | tuple[int, int, int]


def batch_sampler(
    plan: BatchPlan,
    dataset: Any,
    ramp: RampLike | None = None,
    *,
    shuffle: bool = True,
    seed: int = 0,
    rank: int | None = None,
    drop_last: bool | None = None,
    tokens_per_sample: int = 1,
) -> PlannedSampler:
    """Return the index batches of one rank; see ``BatchPlan.batch_sampler``."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise InvalidRequest("The data set has no length, so its rows have no indices to draw. Give the ramp to a data set with rows.")
    return PlannedSampler(
        plan,
        dataset,
        _ramp(plan, ramp, tokens_per_sample),
        shuffle=shuffle,
        seed=seed,
        rank=this_rank(plan, rank),
        drop_last=plan.drop_last if drop_last is None else drop_last,
    )


class PlannedSampler(Sampler[list[int]]):
    """Lists of row indices, a batch each, for ``DataLoader(dataset, batch_sampler=…)``; the rows of an epoch are ``DistributedSampler``'s.

    A ramp changes how many batches make up an optimizer step, never which rows a batch has. ``window(index)`` says which step the
    ``index``-th batch of the epoch belongs to; it does not depend on how far ahead a loader's workers draw.

    Attributes:
        epoch: number of the epoch, as last set; the order of rows depends on it.
        ramp: the global batch size over the samples seen.
    """

    def __init__(self, plan: BatchPlan, dataset: Any, ramp: Ramp, *, shuffle: bool, seed: int, rank: int, drop_last: bool) -> None:
        self._rows, self._batch_size, self._world_size = len(dataset), plan.batch_size, plan.world_size
        self._base, self._rule, self._noise_scale = plan.global_batch_size, plan.lr_rule, plan.noise_scale
        self.ramp, self._seed, self.epoch = ramp, seed, 0
        ramp.check_multiple(self._batch_size * self._world_size)
        self._order: DistributedSampler[Any] = DistributedSampler(
            dataset, num_replicas=self._world_size, rank=rank, shuffle=shuffle, seed=seed, drop_last=drop_last
        )
        self._batches = BatchSampler(self._order, self._batch_size, drop_last)
        self._epoch = epoch(self._rows, self._batch_size, world_size=self._world_size, drop_last=drop_last)
        self._seen = self._drawn = 0  # samples before this epoch; batches drawn of it
        self._resumed = False
        self._windows: list[Window] = []
        for stage in ramp.stages:
            self._lr_scale(stage.global_batch_size)  # a rule that cannot say is told now, not at the stage

    def __len__(self) -> int:
        return self._epoch.iterations

    def __iter__(self) -> Iterator[list[int]]:
        if not self._resumed:
            self._start_over()
        self._resumed = False
        for batch in itertools.islice(self._batches, self._drawn, None):
            self._drawn += 1
            yield batch

    def set_epoch(self, number: int) -> None:
        """Begin epoch ``number``, whose rows have an order of their own; the epoch that a state was loaded for goes on where it was."""
        if number != self.epoch:
            self._start_over()
            self._resumed = False
        self.epoch = number
        self._order.set_epoch(number)

    def window(self, batch: int | None = None) -> Window:
        """Return the optimizer step that the batch with index ``batch`` in the epoch belongs to, by default the batch drawn last.

        Raises:
            IndexError: the epoch has no such batch.
        """
        index = max(0, self._drawn - 1) if batch is None else batch
        if not self._windows:
            rows = self._batch_size * self._world_size
            self._windows = list(windows(self.ramp, batches=len(self), rows=rows, seen=self._seen, lr_scale=self._lr_scale))
        found = next((window for window in self._windows if window.first <= index <= window.last), None)
        if found is None:
            raise IndexError(f"the epoch has {len(self)} batches, none with index {index}")
        return found

    @property
    def global_batch_size(self) -> int:
        """Rows in the optimizer step of the batch drawn last."""
        return self.window().global_batch_size

    @property
    def lr_scale(self) -> float:
        """Learning rate for the batch drawn last, as a multiple of the plan's."""
        return self.window().lr_scale

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Return where training is, in plain values.

        Args:
            batches: batches of this epoch that training has had; by default those drawn, which is the same without worker processes.
                A loader's workers draw ahead of training: with them, pass the number of batches that were trained on.
        """
        return {"epoch": self.epoch, "batches": self._drawn if batches is None else batches, "samples": self._seen, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where ``state_dict`` was taken: the next iteration begins with the batch after.

        Raises:
            InvalidRequest: the state is of other rows, batch size, ranks or seed.
        """
        other = {key: (state.get(key), value) for key, value in self._identity().items() if state.get(key) != value}
        if other:
            named = ", ".join(f"{key} {theirs} there and {ours} here" for key, (theirs, ours) in other.items())
            raise InvalidRequest(f"The sampler's state does not fit: {named}. Resume with the plan, data set and seed it was made with.")
        self.epoch, self._drawn, self._seen = state["epoch"], state["batches"], state["samples"]
        self._order.set_epoch(self.epoch)
        self._resumed, self._windows = True, []

    def _identity(self) -> dict[str, int]:
        return {"rows": self._rows, "batch_size": self._batch_size, "world_size": self._world_size, "seed": self._seed}

    def _start_over(self) -> None:
        """Count what was drawn of an epoch as seen, and begin one."""
        self._seen += min(self._drawn * self._batch_size, self._epoch.rows) * self._world_size
        self._drawn, self._windows = 0, []

    def _lr_scale(self, global_batch_size: int) -> float:
        if global_batch_size == self._base:
            return 1.0
        if self._rule is None or self._rule not in RULES:
            raise InvalidRequest(
                f"The plan's learning-rate rule is {self._rule or 'none at all'}, which says nothing about the ramp's batch of "
                f"{global_batch_size:,} rows. Plan with base_lr= and one of: {', '.join(RULES)}."
            )
        return scale(self._rule, 1.0, global_batch_size, self._base, noise_scale=self._noise_scale).lr


def this_rank(plan: BatchPlan, rank: int | None) -> int:
    """Return which of the plan's ranks this process is.

    Raises:
        InvalidRequest: it cannot be known, or there is no such rank.
    """
    if rank is None:
        started = dist.is_available() and dist.is_initialized()
        rank = dist.get_rank() if started else 0 if plan.world_size == 1 else None
    if rank is None:
        raise InvalidRequest(f"The plan is for {plan.world_size} ranks, and torch.distributed is not started. Start it, or pass rank=.")
    if not 0 <= rank < plan.world_size:
        raise InvalidRequest(f"rank is {rank}; the plan has ranks 0 to {plan.world_size - 1}. Plan with the world size that trains.")
    return rank


def _ramp(plan: BatchPlan, ramp: RampLike | None, tokens_per_sample: int) -> Ramp:
    if ramp is None:
        return Ramp.constant(plan.global_batch_size)
    if isinstance(ramp, str):
        return Ramp.parse(ramp, tokens_per_sample)
    if isinstance(ramp, Ramp):
        return ramp
    start, increment, samples = ramp
    return Ramp.steps(start, increment, samples, plan.global_batch_size)
