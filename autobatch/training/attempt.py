"""One micro-batch that may run out of memory, and what is put back when it does."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autobatch.core.errors import InvalidRequest
from autobatch.devices.forget import forget, give_back
from autobatch.workload.randomness import generator_undo, generators, process_undo
from autobatch.workload.undo import Undo


class Attempt:
    """One micro-batch that may run out of memory: a context around its forward and backward pass.

    Attributes:
        batch: its rows, in the nest of the whole batch.
        rows: how many they are.
        weight: what its loss is multiplied by, so that the sum over the micro-batches has the gradient of the whole batch.
    """

    def __init__(self, batch: Any, rows: int, weight: float, state: TrainedState, runs_out: Callable[[Exception, int], bool]) -> None:
        self.batch, self.rows, self.weight = batch, rows, weight
        self._state, self._runs_out = state, runs_out
        self._undo: list[Undo] = []
        self._failure: Exception | None = None
        self._loss: weakref.ref[Tensor] | None = None
        self._entered = False

    def weighted(self, loss: Tensor) -> Tensor:
        """Return ``loss`` times the weight, ready for ``backward()``.

        Raises:
            InvalidRequest: the loss depends on parameters of a module that was not given.
        """
        self._state.check(loss)
        self._loss = weakref.ref(loss)
        return loss * self.weight

    def __enter__(self) -> Attempt:
        self._entered = True
        self._undo = self._state.take()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None) -> bool:
        self._state.stop_copying()
        if isinstance(error, Exception) and self._runs_out(error, self.rows):
            self._failure = error
        else:
            self._undo.clear()
        return self._failure is not None

    def undo_failure(self) -> tuple[Exception | None, bool]:
        """Put everything back if the attempt ran out of memory; return its error, and whether a variable still holds its memory.

        To be called outside the ``with`` block, where no handler holds the error and its frames any more.
        """
        if not self._entered:
            raise InvalidRequest("A micro-batch was run without its context. Write: for micro in …micro_batches(batch): with micro: …")
        failure, self._failure = self._failure, None
        if failure is None:
            return None, False
        forget(failure)
        give_back()
        with torch.no_grad():
            for put_back in self._undo:
                put_back()
        self._undo.clear()
        return failure, self._loss is not None and self._loss() is not None


class TrainedState:
    """What a failed attempt may have changed: the modules' gradients and buffers, and random states.

    Gradients that were there before are copied when the backward pass comes to them: activations have made room by then. Where there
    were none, as after ``zero_grad()``, nothing is copied.
    """

    def __init__(self, modules: tuple[nn.Module, ...], step: Any) -> None:
        self._modules = modules
        self._generators = list(generators(step, *modules))
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._checked = False

    def take(self) -> list[Undo]:
        """Return functions that put everything back as it is now."""
        undo = [*process_undo(), *filter(None, map(generator_undo, self._generators))]
        undo += [_buffers_undo(module) for module in {part for root in self._modules for part in root.modules()} if module._buffers]
        for parameter in self._parameters():
            copies: list[Tensor] = []
            if parameter.grad is not None and parameter.requires_grad:
                copy = functools.partial(_copy_gradient, parameter, copies)
                self._hooks.append(parameter.register_hook(copy))  # type: ignore[no-untyped-call]
            undo.append(functools.partial(_put_gradient, parameter, parameter.grad, copies))
        return undo

    def stop_copying(self) -> None:
        """Take the hooks that copy gradients off the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def check(self, loss: Tensor) -> None:
        """Look, the first time, whether ``loss`` depends on other parameters than the modules'.

        Raises:
            InvalidRequest: it does, so that their gradients could not be put back.
        """
        if self._checked:
            return
        known = set(self._parameters())
        others = [tuple(parameter.shape) for parameter in _parameters_of(loss) if parameter not in known]
        if others:
            raise InvalidRequest(
                f"The loss depends on {len(others)} parameters that belong to none of the modules given (the first has shape {others[0]}), "
                "so their gradients could not be put back after an out-of-memory error. Give every module: model=[model, head]."
            )
        self._checked = True

    def _parameters(self) -> Iterator[nn.Parameter]:
        yield from dict.fromkeys(parameter for module in self._modules for parameter in module.parameters() if not is_lazy(parameter))


def _copy_gradient(parameter: nn.Parameter, copies: list[Tensor], _: Tensor) -> None:
    if not copies and parameter.grad is not None:
        copies.append(parameter.grad.detach().clone())


def _put_gradient(parameter: nn.Parameter, gradient: Tensor | None, copies: list[Tensor]) -> None:
    if gradient is not None and copies:
        gradient.detach().copy_(copies[0])
    parameter.grad = gradient


def _buffers_undo(module: nn.Module) -> Undo:
    """Return a function that puts the module's own buffers back, the objects and their numbers."""
    copies = {name: (one, one.detach().clone()) for name, one in module._buffers.items() if one is not None and not is_lazy(one)}

    def undo() -> None:
        for name, (buffer, copy) in copies.items():
            buffer.detach().copy_(copy)
            module._buffers[name] = buffer

    return undo


def _parameters_of(loss: Tensor) -> Iterator[nn.Parameter]:
    """Yield the parameters that autograd's graph of ``loss`` ends in."""
    todo, seen = [loss.grad_fn], set[Any]()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter):
            yield leaf
        todo += [following for following, _ in node.next_functions]
