"""What a plan does for the training loop, as methods of the plan. The work is done in ``training/``, which is loaded when it is called.

This is the one file of ``core`` that names a room above it: a plan is data, and its methods are how users reach that room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from autobatch.core.noise_scale import NoiseScale
    from autobatch.core.plan import BatchPlan
    from autobatch.core.scaling import Scaled
    from autobatch.core.schedule import Ramp
    from autobatch.training.accumulation import MicroStep
    from autobatch.training.loading import DataLoader
    from autobatch.training.ramps import PlannedSampler
    from autobatch.training.rates import LRScheduler, Optimizer


class ForTraining:
    """Methods of a ``BatchPlan`` for the training loop."""

    __slots__ = ()

    batch_size: int
    accumulation_steps: int

    def micro_batches(
        self,
        batch: Any,
        *,
        loss: str,
        count: Callable[[Any], Any] | str | int | None = None,
        ignore_index: int = -100,
        across_ranks: bool | None = None,
    ) -> list[MicroStep]:
        """Return one optimizer step's ``batch`` in the fewest micro-batches of at most ``batch_size`` rows, as equal as can be.

        Multiply each one's loss by its ``weight`` (``micro.weighted(loss).backward()``): the accumulated gradient is that of the whole
        batch. Clip, step the optimizer, the scheduler and the scaler once, after the last. Layers that look at the whole batch
        (BatchNorm) see one micro-batch at a time, which no weight undoes.

        Args:
            batch: what this process trains on in one optimizer step: any nest of tensors, dimension 0 counting rows.
            loss: what the loss function does: ``"mean"`` over rows, ``"sum"``, or ``"tokens"``: mean over the tokens that count.
            count: for ``"tokens"``: key or index of the labels in the batch, or a function that counts a micro-batch's tokens.
            ignore_index: label that does not count.
            across_ranks: whether weights are over all ranks, for gradients that are averaged over ranks. All ranks must call then.

        Raises:
            InvalidRequest: tensors of the batch differ in the length of dimension 0; nothing in it counts; ``loss`` and ``count`` do not
                go together; or several ranks train and ``across_ranks`` has to be said.
        """
        from autobatch.training.accumulation import Reduction, micro_batches

        return micro_batches(batch, self.batch_size, Reduction(loss, count, ignore_index), across_ranks=across_ranks)

    def windows(
        self,
        loader: Iterable[Any],
        *,
        loss: str,
        count: Callable[[Any], Any] | str | int | None = None,
        ignore_index: int = -100,
        across_ranks: bool | None = None,
    ) -> Iterator[list[MicroStep]]:
        """Yield the micro-batches that ``loader`` yields, ``accumulation_steps`` at a time: one list an optimizer step.

        The last list of an epoch may be shorter and is divided by what it has. Arguments and errors are those of ``micro_batches``; rows
        are counted for ``loss="mean"`` alone. A list is read from the loader before its first micro-batch runs.
        """
        from autobatch.training.accumulation import Reduction, windows

        return windows(loader, self.accumulation_steps, Reduction(loss, count, ignore_index), across_ranks=across_ranks)

    def apply(self, optimizer: Optimizer, *, everything: bool = False) -> tuple[Scaled, ...]:
        """Write the plan's learning rates into the optimizer's parameter groups, and return what was written.

        Call it once, before learning-rate schedules are built. The groups are marked, and the mark is saved and loaded with the
        optimizer's state, so that a resumed run cannot be scaled twice.

        Args:
            optimizer: one like the plan was made for, with the learning rates it had then, or with the plan's base learning rate.
            everything: write betas, eps and decoupled weight decay too, as ``plan.scaling`` lists them; by default they stay.

        Raises:
            InvalidRequest: the optimizer was scaled already, has a schedule already, or is not as the plan knows it: number of groups,
                learning rates, family. Nothing has been written then.
        """
        from autobatch.training import rates

        return rates.apply(cast("BatchPlan", self), optimizer, everything)

    def warmup(self, optimizer: Optimizer, *, samples: int | None = None, epochs: int | None = None) -> LRScheduler:
        """Return torch's schedule for a linear warm-up from the base learning rate to the plan's, to be stepped once an optimizer step.

        The base rate is where it begins, not zero (Goyal et al. 2017, arXiv 1706.02677). A rate that was not scaled up has no warm-up:
        the schedule then changes nothing. It goes before a schedule of your own in ``SequentialLR``, or beside it in ``ChainedScheduler``.

        Args:
            optimizer: the optimizer, after ``apply``.
            samples: its length in samples.
            epochs: its length in epochs; by default ``plan.warmup_steps`` optimizer steps, which are 5 epochs.

        Raises:
            InvalidRequest: the optimizer does not have the plan's learning rates, or the length is not known.
        """
        from autobatch.training import rates

        return rates.warmup(cast("BatchPlan", self), optimizer, samples, epochs)

    def batch_sampler(
        self,
        dataset: Any,
        ramp: Ramp | str | tuple[int, int, int] | None = None,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        drop_last: bool | None = None,
        tokens_per_sample: int = 1,
    ) -> PlannedSampler:
        """Return index batches of the plan's batch size for ``DataLoader(dataset, batch_sampler=…)``, resumable in the middle of an epoch.

        Its ``window(index)`` says which optimizer step a batch belongs to, how many batches that step has, and its learning rate as a
        multiple of the plan's, by the plan's rule.

        Args:
            dataset: the data set, with a length.
            ramp: how the global batch size grows: a ``Ramp``, ``"0:768 1M:1536"``, or ``(start, increment, samples)`` up to the plan's;
                by default it is the plan's throughout.
            shuffle, seed: whether and how the rows of an epoch are shuffled, the same on all ranks.
            rank: which of the plan's ranks this is; by default what ``torch.distributed`` says.
            drop_last: by default the plan's.
            tokens_per_sample: where the thresholds of a ramp written as text are tokens: how many make a sample.

        Raises:
            InvalidRequest: a stage is no multiple of the rows that all devices run at once, the ramp goes down, the plan's rule cannot
                say the learning rate of a stage, or the rank is not known.
        """
        from autobatch.training import ramps

        return ramps.batch_sampler(
            cast("BatchPlan", self),
            dataset,
            ramp,
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            drop_last=drop_last,
            tokens_per_sample=tokens_per_sample,
        )

    def dataloader(self, dataset: Any, *, rank: int | None = None, seed: int = 0, **options: Any) -> DataLoader[Any]:
        """Return a ``DataLoader`` with the plan's batch size, shuffled, and as many workers and batches ahead as the host has room for.

        Its attribute ``autobatch_note`` says why it has these workers.

        Args:
            dataset: a data set, or a loader of your own: its collate function, sampler, generator and worker seeds are kept.
            rank, seed: for the ``DistributedSampler`` of a plan for several ranks.
            options: ``DataLoader``'s own arguments; each of them goes before what would be chosen.

        Raises:
            InvalidRequest: the loader makes its batches with a batch sampler of its own, or the rank is not known.
        """
        from autobatch.training import loading

        return loading.dataloader(cast("BatchPlan", self), dataset, rank=rank, seed=seed, **options)

    def with_noise_scale(self, noise: NoiseScale) -> BatchPlan:
        """Return this plan with notes on what ``noise``, from ``autobatch.noise_scale``, means for it.

        They say which constraint ends the use of larger batches first (memory, throughput or convergence), and at which size the time to
        a given loss is least. The batch size stays as it is: the noise scale is near zero at initialisation and grows.
        """
        from autobatch.core.convergence import with_noise_scale

        return with_noise_scale(cast("BatchPlan", self), noise)
