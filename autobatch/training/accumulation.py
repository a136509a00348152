"""Gradient accumulation that gives the gradient of the whole batch: how it is cut, and what each micro-batch weighs.

A loss that is a mean over ``n`` terms has, over a whole of ``N`` terms, the gradient ``Σ nᵢ/N · gᵢ`` of its micro-batches' gradients
``gᵢ``; a sum has ``Σ gᵢ``. Terms are rows, or tokens where padding is left out of the mean: 10 tokens at 2.5 and 90 at 0.5 have a mean
loss of 0.70, not 1.50. Distributed data parallelism averages gradients over R ranks, so with N counted over all of them each weight
is ``R · nᵢ/N``.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from autobatch.core.errors import InvalidRequest
from autobatch.core.units import divide_up
from autobatch.workload.batches import count_rows, cut

LOSSES = ("mean", "sum", "tokens")

_REMEDY = "micro-batches from the loader itself, and go through them with plan.windows(loader, …)"


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroStep:
    """One micro-batch of an optimizer step.

    Attributes:
        batch: its rows, in the nest of the whole batch.
        weight: what its loss is multiplied by, so that the sum over the steps has the gradient of the whole batch.
        terms: rows its loss averages over, or tokens; ``None`` for a loss that is a sum.
        index: which micro-batch of the optimizer step it is, from 0.
        steps: micro-batches in the optimizer step.
    """

    batch: Any
    weight: float
    terms: float | None
    index: int
    steps: int

    @property
    def is_last(self) -> bool:
        """Whether the optimizer steps after this micro-batch."""
        return self.index == self.steps - 1

    def weighted(self, loss: Tensor) -> Tensor:
        """Return ``loss`` times the weight, ready for ``backward()`` or for a gradient scaler.

        Warns when the last thing done to ``loss`` was to divide it by the number of micro-batches, which the weight does already.
        """
        if self.steps > 1 and self.terms != self.steps and math.isclose(_divisor(loss) or 0, self.steps):
            warnings.warn(
                f"The loss was divided by {self.steps}, the number of micro-batches in this optimizer step, and its weight "
                f"({self.weight:.4g}) does the same once more: the gradient is {self.steps} times too small. Pass the loss as the loss "
                "function returns it.",
                stacklevel=2,
            )
        return loss * self.weight

    def sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Return the context for forward and backward pass under which ranks exchange gradients once, in the last micro-batch.

        It is ``model.no_sync()`` for all but the last micro-batch of a model that has it (DistributedDataParallel, FSDP), and does
        nothing otherwise. Under FSDP, gradients that are not exchanged are not sharded either and take more memory.
        """
        no_sync = None if self.is_last else getattr(model, "no_sync", None)
        return nullcontext() if no_sync is None else no_sync()


@dataclass(frozen=True, slots=True)
class Reduction:
    """How a loss function makes one number of many, which decides what micro-batches weigh.

    Attributes:
        loss: ``"mean"`` over rows, ``"sum"``, or ``"tokens"``: mean over the tokens that ``count`` counts.
        count: for ``"tokens"``, ``count(micro-batch) -> number``, or the key or index of the labels in the batch.
        ignore_index: label that does not count, where ``count`` is a key or an index.

    Raises:
        InvalidRequest: the kind of loss is unknown, or is given a count it does not need or not the one it needs.
    """

    loss: str
    count: Callable[[Any], Any] | str | int | None = None
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise InvalidRequest(
                f"loss is {self.loss!r}; known: 'mean' (the loss function averages over rows), 'sum', and 'tokens' (it averages over "
                "tokens that are not padding)."
            )
        if self.loss == "tokens" and self.count is None:
            raise InvalidRequest(
                "loss='tokens' needs count=: the key of the labels in the batch (count='labels', or count=1 for a pair), or a function "
                "that counts the tokens the loss averages over. A model that shifts the labels itself leaves the first of each row "
                "out: count=lambda batch: (batch['labels'][:, 1:] != -100).sum()."
            )
        if self.loss != "tokens" and self.count is not None:
            raise InvalidRequest(f"count= belongs to loss='tokens'; with loss={self.loss!r} it would not be used. Leave one of them out.")

    def terms(self, batches: Sequence[Any]) -> list[float] | list[None]:
        """Return how many terms the loss of each of ``batches`` is a mean of, ``None`` for sums."""
        if self.loss == "sum":
            return [None] * len(batches)
        if self.loss == "mean":
            return [float(count_rows(batch, "batch", "loss='tokens' and count=, a function that counts rows")) for batch in batches]
        # Stacked, so that counts made on a card are waited for once.
        counted = torch.stack([torch.as_tensor(self._count(batch)).reshape(()) for batch in batches]).tolist()
        for number in counted:
            if not 0 <= number < math.inf:
                raise InvalidRequest(f"count= gave {number!r} for a micro-batch; the number of tokens its loss averages over is wanted.")
        return [float(number) for number in counted]

    def _count(self, batch: Any) -> Any:
        if callable(self.count):
            return self.count(batch)
        try:
            labels = batch[self.count]
        except (KeyError, IndexError, TypeError):
            labels = getattr(batch, str(self.count), None)
        if not isinstance(labels, Tensor):
            raise InvalidRequest(
                f"count={self.count!r} leads to no tensor of labels in the batch ({type(batch).__name__}). Give the key or the index "
                "under which the batch has its labels, or a function that counts them."
            )
        return (labels != self.ignore_index).sum()


def micro_batches(batch: Any, size: int, reduction: Reduction, *, across_ranks: bool | None = None) -> list[MicroStep]:
    """Return ``batch`` in the fewest micro-batches of at most ``size`` rows, as equal as can be.

    Args:
        batch: any nest of tensors whose dimension 0 counts rows; its parts are views.
        size: rows that fit.
        reduction: how the loss function makes one number of many.
        across_ranks: see ``weigh``.

    Raises:
        InvalidRequest: tensors of the batch differ in the length of dimension 0, or nothing in it counts.
    """
    rows = count_rows(batch, "batch", _REMEDY)
    parts, start = [], 0
    while start < rows:
        stop = start + equal_part(rows - start, size)
        parts.append(cut(batch, rows, slice(start, stop)))
        start = stop
    return weigh(parts, reduction, across_ranks=across_ranks)


def windows(loader: Iterable[Any], steps: int, reduction: Reduction, *, across_ranks: bool | None = None) -> Iterator[list[MicroStep]]:
    """Yield the micro-batches of ``loader``, ``steps`` at a time: one list an optimizer step.

    The last list may be shorter, and weighs what it has. A list is read before its first micro-batch runs, because weights need all
    counts.
    """
    batches = iter(loader)
    while window := list(itertools.islice(batches, steps)):
        yield weigh(window, reduction, across_ranks=across_ranks)


def weigh(batches: Sequence[Any], reduction: Reduction, *, across_ranks: bool | None = None) -> list[MicroStep]:
    """Return ``batches``, the micro-batches of one optimizer step, with their weights.

    A micro-batch in which no token counts is left out: it adds nothing, and its own mean would be 0/0. Where a rank has no other, all
    stay, with weight 0.

    Args:
        batches: the micro-batches of this process.
        reduction: how the loss function makes one number of many.
        across_ranks: whether the weights are those of the whole over all ranks of the default process group, for gradients that are
            averaged over ranks afterwards. All ranks must call then. By default ranks weigh for themselves, which is the same for means
            over equally many rows; where it makes a difference (``"sum"``, ``"tokens"``) it has to be said.

    Raises:
        InvalidRequest: no token counts, on any rank; or several ranks train and it is not said whether they weigh together.
    """
    terms = reduction.terms(batches)
    factor, total = _over_ranks(None if reduction.loss == "sum" else sum(filter(None, terms)), reduction, across_ranks)
    if total == 0:
        raise InvalidRequest(
            f"No token of the {len(batches)} micro-batches counts, so the mean loss would be 0/0. Leave such a batch out, or look at "
            "count= and ignore_index=."
        )
    kept = [pair for pair in zip(batches, terms, strict=True) if pair[1] != 0] or list(zip(batches, terms, strict=True))
    return [
        MicroStep(
            batch=batch,
            weight=factor if own is None or total is None else factor * own / total,
            terms=own,
            index=index,
            steps=len(kept),
        )
        for index, (batch, own) in enumerate(kept)
    ]


def _over_ranks(total: float | None, reduction: Reduction, across_ranks: bool | None) -> tuple[float, float | None]:
    """Return the factor that undoes the average over ranks, and the terms of all of them."""
    ranks = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if ranks == 1:
        return 1.0, total
    if across_ranks is None and reduction.loss != "mean":
        raise InvalidRequest(
            f"{ranks} ranks train together with loss={reduction.loss!r}, and an average over their gradients is not that of the global "
            "batch. Give across_ranks=True for its gradient (every rank must call), or across_ranks=False to weigh each rank alone."
        )
    if not across_ranks:
        return 1.0, total
    totals: list[Any] = [None] * ranks
    if total is not None:
        distributed.all_gather_object(totals, total)
    return float(ranks), None if total is None else sum(totals)


def equal_part(rows: int, size: int) -> int:
    """Return the rows of the next of the fewest parts of at most ``size`` rows, as equal as can be."""
    return divide_up(rows, divide_up(rows, size))


def _divisor(loss: Tensor) -> float | None:
    """Return what ``loss`` was divided by last, read from autograd's graph, where that is a number and not on a card."""
    node = loss.grad_fn
    other = getattr(node, "_saved_other", None)
    if node is None or not isinstance(other, Tensor) or other.numel() != 1 or other.device.type != "cpu" or not other:
        return None
    name = type(node).__name__
    if name == "DivBackward0":
        return float(other)
    return 1 / float(other) if name == "MulBackward0" else None
