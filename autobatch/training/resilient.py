"""A training step that outlives running out of memory: what failed is undone, and run again as smaller micro-batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

from autobatch.core.errors import InvalidRequest, NoBatchSizeFits
from autobatch.core.units import divide_up
from autobatch.devices.forget import first_line
from autobatch.devices.oom import classify
from autobatch.training.accumulation import MicroStep, Reduction, equal_part
from autobatch.training.attempt import Attempt, TrainedState
from autobatch.workload.batches import count_rows, cut
from autobatch.workload.workload import checked_loss

_REMEDY = "a step that splits its batch itself"


def resilient(
    step: Callable[[Any], Tensor] | None = None,
    *,
    model: nn.Module | Iterable[nn.Module],
    loss: str,
    count: Callable[[Any], Any] | str | int | None = None,
    ignore_index: int = -100,
    batch_size: int | None = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
    on_split: Callable[[str], object] | None = None,
) -> Resilient:
    """Return ``step`` with its backward pass, so that a batch which runs out of memory is split and not lost.

    Args:
        step: ``step(batch) -> loss``, forward pass and loss alone; left out where the loop uses ``micro_batches``.
        model: the module, or all the modules, whose parameters the loss depends on.
        loss: what the loss function does: ``"mean"`` over rows, ``"sum"``, or ``"tokens"``: mean over the tokens that count.
        count: for ``"tokens"``: key or index of the labels in the batch, or a function that counts a micro-batch's tokens.
        ignore_index: label that does not count.
        batch_size: rows to run at once from the start, such as ``plan.batch_size``; by default a whole batch.
        backward: what to do with the weighted loss, for example ``lambda loss: scaler.scale(loss).backward()``.
        on_split: called with a line of text when the size shrinks; by default that is a ``RuntimeWarning``.

    Raises:
        InvalidRequest: no module is given, one of them trains over several ranks, or ``loss`` and ``count`` do not go together.
    """
    modules = (model,) if isinstance(model, nn.Module) else tuple(model)
    _check(modules, batch_size)
    return Resilient(step, modules, Reduction(loss, count, ignore_index), batch_size, backward, on_split)


class Resilient:
    """A training step that outlives running out of memory; ``resilient`` makes it.

    A micro-batch that runs out is undone (gradients as they were before it, with all that was accumulated; random states; the modules'
    buffers) and its rows are run again in micro-batches of half the size, weighted so that the gradient is that of the whole batch.
    Layers that look at a whole batch (BatchNorm) then see smaller ones, and dropout draws other masks, as with any other way to cut it.
    Nothing else that the step changes is put back. The optimizer's own step is not guarded.

    Attributes:
        batch_size: rows to run at once, ``None`` while whole batches fit. It shrinks and never grows by itself; it may be set.
        notes: what happened, a line for every time it shrank.
    """

    def __init__(
        self,
        step: Callable[[Any], Tensor] | None,
        modules: tuple[nn.Module, ...],
        reduction: Reduction,
        batch_size: int | None,
        backward: Callable[[Tensor], object],
        on_split: Callable[[str], object] | None,
    ) -> None:
        self._step, self._reduction, self._backward, self._on_split = step, reduction, backward, on_split
        self._state = TrainedState(modules, step)
        self._smallest_run: int | None = None
        self.batch_size = batch_size
        self.notes: list[str] = []

    def __call__(self, batch: Any) -> Tensor:
        """Run forward and backward pass of ``batch`` and return its loss, without a graph; gradients are added to ``.grad``.

        A ``MicroStep`` is run with its weight, and its share of the whole loss is returned.

        Raises:
            NoBatchSizeFits: a single row runs out of memory.
            InvalidRequest: the batch cannot be split into rows, nothing in it counts, or the loss depends on parameters of a module
                that was not given.
            Exception: what the step raises that is not about memory, as it is.
        """
        weight = 1.0
        if isinstance(batch, MicroStep):
            batch, weight = batch.batch, batch.weight
        losses: list[Tensor] = []
        for attempt in self.micro_batches(batch):
            with attempt:
                losses.append(self._run(attempt, weight))
        return torch.stack(losses).sum()

    def micro_batches(self, batch: Any) -> Iterator[Attempt]:
        """Yield the micro-batches of ``batch`` to run in the loop, each in a ``with`` block of its own.

        ::

            for micro in guard.micro_batches(batch):
                with micro:
                    micro.weighted(loss_of(micro.batch)).backward()

        When a block runs out of memory, its rows come again in smaller micro-batches. A variable that the block assigned keeps what it
        holds, as anywhere in Python; a failed attempt that is held like this leaves less room for the next, so call a function.

        Raises:
            NoBatchSizeFits: a single row runs out of memory.
            InvalidRequest: the batch cannot be split into rows, nothing in it counts, or a ``with`` block was left out.
        """
        rows, total, done = count_rows(batch, "batch", _REMEDY), self._terms(batch), 0
        if total == 0:
            raise InvalidRequest("No token of the batch counts, so its mean loss would be 0/0. Leave it out, or look at count=.")
        while done < rows:
            size = equal_part(rows - done, self.batch_size or rows)
            part = cut(batch, rows, slice(done, done + size))
            terms = self._terms(part)
            if terms == 0:  # adds nothing, and its own mean would be 0/0
                done += size
                continue
            attempt = Attempt(part, size, 1.0 if terms is None or total is None else terms / total, self._state, self._runs_out)
            yield attempt
            failure, held = attempt.undo_failure()
            if failure is None:
                done, self._smallest_run = done + size, min(size, self._smallest_run or size)
            elif size == 1:
                raise _nothing_fits(rows, done, failure) from failure
            else:
                self._shrink(size, failure, held)

    def _run(self, attempt: Attempt, weight: float) -> Tensor:
        if self._step is None:
            raise InvalidRequest("No step was given to resilient(step, model=…), so only its micro_batches(batch) can be used.")
        loss = attempt.weighted(checked_loss(self._step(attempt.batch), "step")) * weight
        self._backward(loss)
        return loss.detach().reshape(())

    def _terms(self, batch: Any) -> float | None:
        return self._reduction.terms([batch])[0]

    def _runs_out(self, error: Exception, rows: int) -> bool:
        """Whether ``error`` says that ``rows`` rows are too many."""
        return classify(error, ran_before=self._smallest_run is not None and self._smallest_run < rows) is not None

    def _shrink(self, size: int, failure: Exception, held: bool) -> None:
        """Run half of ``size`` rows at once from now on, and say so."""
        self.batch_size = divide_up(size, 2)
        note = (
            f"{size} rows ran out of memory ({first_line(failure)}); they run again as micro-batches of at most {self.batch_size} rows "
            "with the same gradient, and so do later batches"
        )
        if held:
            note += "; a variable of the with block still holds the failed attempt's memory: call a function in the block instead"
        self.notes.append(note)
        if self._on_split is not None:
            self._on_split(note)
        else:
            warnings.warn(note, RuntimeWarning, stacklevel=4)


def _check(modules: tuple[Any, ...], batch_size: int | None) -> None:
    if not modules or not all(isinstance(module, nn.Module) for module in modules):
        given = ", ".join(type(module).__name__ for module in modules) or "nothing"
        raise InvalidRequest(f"model= got {given}; the torch.nn.Module whose parameters are trained is wanted, or a list of all of them.")
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise InvalidRequest(f"batch_size is {batch_size!r}; a whole number of 1 or more is wanted, or None for whole batches.")
    ranks = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    shared = [one for root in modules for one in root.modules() if hasattr(one, "no_sync") or hasattr(one, "set_requires_gradient_sync")]
    if ranks > 1 and shared:
        raise InvalidRequest(
            f"The model is a {type(shared[0]).__name__} over {ranks} ranks. A rank that runs out of memory and runs again alone would "
            "leave the others waiting for its gradients. Find a size that fits every rank with autobatch.find, and use plan.micro_batches."
        )


def _nothing_fits(rows: int, done: int, failure: Exception) -> NoBatchSizeFits:
    return NoBatchSizeFits(
        f"A single row ran out of memory: {first_line(failure)}. {done} of the batch's {rows} rows are in the gradients; call "
        "optimizer.zero_grad() before going on. Likely the model, its gradients and the optimizer's state leave too little room, or "
        "something else took memory meanwhile. Next: autobatch.find(model, sample) says what a row needs; a smaller sample, bf16 autocast "
        "or activation checkpointing needs less.",
        batch_size=1,
        needed=None,
        available=None,
    )
