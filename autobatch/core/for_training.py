"""What a plan does for the training loop, as methods of the plan. The work is done in ``training/``, which is loaded when it is called.

This is the one file of ``core`` that names a room above it: a plan is data, and its methods are how users reach that room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autobatch.training.accumulation import MicroStep


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
