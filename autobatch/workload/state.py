"""Everything a training step changes, taken before the first trial and put back bit for bit after the last."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from autobatch.core.errors import InvalidRequest


class Snapshot:
    """The state of a model and its optimizer, moved to ``device`` for the trials.

    Tensors that already are on ``device`` are copied to host memory and copied back; tensors that are elsewhere stay untouched
    where they are while the trials work on their own copy. With ``copies=False`` (a process that ends after the trials) nothing is
    copied for later.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, device: torch.device, *, copies: bool = True) -> None:
        self._keep_copies = copies
        self._undo: list[Callable[[], None]] = []
        self._model, self._optimizer, self._device = model, optimizer, device
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._parameters: set[Tensor] = set()
        self._known_state: set[Tensor] = set(optimizer.state) if optimizer is not None else set()
        try:
            for module in model.modules():
                self._take_module(module)
            if optimizer is not None:
                self._take_optimizer(optimizer)
        except BaseException:
            self.restore()
            raise

    def drop_created(self) -> None:
        """Drop what a trial added: gradients, and optimizer state that was not there before."""
        for parameter in self._model.parameters():
            parameter.grad = None
        self._drop_optimizer_state()

    def restore(self) -> None:
        """Put everything back as it was; a second call does nothing."""
        self._drop_optimizer_state()
        while self._undo:
            self._undo.pop()()
        with torch.no_grad():
            for tensor, copy in self._copies.values():
                tensor.copy_(copy)
        self._copies.clear()

    def _drop_optimizer_state(self) -> None:
        if self._optimizer is not None:
            for parameter in [p for p in self._optimizer.state if p not in self._known_state]:
                del self._optimizer.state[parameter]

    def _take_module(self, module: nn.Module) -> None:
        tables: list[dict[str, Any]] = [vars(module), module._modules, module._parameters, module._buffers]
        for table in tables:
            self._undo.append(_table_undo(table))
            for key, tensor in list(table.items()):
                if isinstance(tensor, nn.Parameter):
                    self._take_parameter(tensor, key)
                elif isinstance(tensor, Tensor):
                    table[key] = self._take(tensor)

    def _take_parameter(self, parameter: nn.Parameter, name: str) -> None:
        if is_lazy(parameter):
            raise InvalidRequest(
                f"The model's parameter {name!r} is not initialised yet (a lazy module). Run the model once on a sample, then call again."
            )
        if parameter in self._parameters:
            return
        self._parameters.add(parameter)
        data, gradient, wanted = parameter.data, parameter.grad, parameter.requires_grad

        def undo() -> None:
            parameter.data = data
            parameter.grad = gradient
            parameter.requires_grad_(wanted)

        self._undo.append(undo)
        parameter.grad = None
        parameter.data = self._take(data)

    def _take_optimizer(self, optimizer: Optimizer) -> None:
        for state in optimizer.state.values():
            self._undo.append(_table_undo(state))
            for key, value in list(state.items()):
                if isinstance(value, Tensor):
                    # The step count is kept on the host by default, wherever the parameter is.
                    state[key] = self._take(value, move=key != "step")
        self._undo.append(_table_undo(optimizer.defaults))
        for group in optimizer.param_groups:
            self._undo.append(_table_undo(group))
            for key, value in list(group.items()):
                if isinstance(value, Tensor):
                    group[key] = self._take(value, move=False)

    def _take(self, tensor: Tensor, move: bool = True) -> Tensor:
        """Keep ``tensor``'s bytes and return the tensor that the trials may write to."""
        if move and tensor.device != self._device:
            return tensor.to(self._device)
        if self._keep_copies and id(tensor) not in self._copies:
            self._copies[id(tensor)] = (tensor.detach(), _host_copy(tensor))
        return tensor


def resident_bytes(model: nn.Module, optimizer: Optimizer | None) -> int:
    """Return the bytes of parameters, buffers, gradients and optimizer state held now, shared storage counted once."""
    storages: dict[int, int] = {}
    for tensor in _tensors(model, optimizer):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(model: nn.Module, optimizer: Optimizer | None) -> Iterator[Tensor]:
    for parameter in model.parameters():
        yield parameter.data
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()
    if optimizer is not None:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _host_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _table_undo(table: dict[Any, Any]) -> Callable[[], None]:
    """Return a function that gives ``table`` the entries it has now."""
    entries = dict(table)

    def undo() -> None:
        table.clear()
        table.update(entries)

    return undo


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """Put the random states of Python, NumPy (when loaded), torch and every CUDA device back at the end, whatever happened."""
    python, cpu = random.getstate(), torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    array = numpy.random.get_state() if numpy is not None else None
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if numpy is not None:
            numpy.random.set_state(array)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
