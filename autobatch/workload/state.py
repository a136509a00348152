"""Everything a training step changes, taken before the first trial and put back bit for bit after the last."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from autobatch.core.errors import InvalidRequest
from autobatch.workload.flags import flags_undo
from autobatch.workload.keeper import Keeper
from autobatch.workload.randomness import keep_random_state
from autobatch.workload.undo import parts

__all__ = ["Snapshot", "keep_random_state", "resident_bytes"]


class Snapshot:
    """The state of a model and its optimizer, moved to ``device`` for the trials, and the switches of the process.

    Tensors that already are on ``device`` are copied to host memory and copied back; tensors that are elsewhere stay untouched
    where they are while the trials work on their own copy. With ``copies=False`` (a process that ends after the trials) nothing is
    copied for later.

    Args:
        model: the module.
        optimizer: the optimizer, if there is one.
        device: where the trials run.
        copies: whether the bytes are needed afterwards.
        also: what else a step may change: functions (with what they have closed over), a scheduler, a scaler, a data loader.

    Raises:
        InvalidRequest: a parameter of the model is not initialised yet.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, device: torch.device, *, copies: bool = True, also: tuple[Any, ...] = ()
    ) -> None:
        self._model, self._optimizer, self._device = model, optimizer, device
        self._known_state: set[Tensor] = set(optimizer.state) if optimizer is not None else set()
        self._moved: dict[int, Tensor] = {}
        _refuse_lazy(model)
        self._kept = Keeper({id(tensor) for _, _, tensor in self._elsewhere()}, copies=copies)
        self._flags: list[Callable[[], object]] = []
        try:
            self._flags = flags_undo()
            self._kept.take(model, optimizer, *also)
            self._drop_gradients()
            with torch.no_grad():
                self._move()
        except BaseException:
            self.restore()
            raise

    def drop_created(self) -> None:
        """Drop what a trial added: gradients, and optimizer state that was not there before."""
        self._drop_gradients()
        self._drop_optimizer_state()

    def restore(self) -> None:
        """Put everything back as it was, also when Ctrl-C comes meanwhile; a second call does nothing."""
        with _uninterrupted():
            self._drop_optimizer_state()
            try:
                self._kept.restore()
            finally:
                for undo in self._flags:
                    undo()
                self._flags.clear()
                self._moved.clear()

    def _drop_gradients(self) -> None:
        for parameter in self._parameters():
            parameter.grad = None

    def _parameters(self) -> Iterator[Tensor]:
        yield from self._model.parameters()
        for group in self._optimizer.param_groups if self._optimizer is not None else ():
            yield from group["params"]

    def _drop_optimizer_state(self) -> None:
        if self._optimizer is not None:
            for parameter in [p for p in self._optimizer.state if p not in self._known_state]:
                del self._optimizer.state[parameter]

    def _move(self) -> None:
        """Give the trials copies on the device of the tensors that are elsewhere."""
        for container, key, tensor in self._elsewhere():
            if id(tensor) not in self._moved:
                self._moved[id(tensor)] = tensor.data.to(self._device)
            moved = self._moved[id(tensor)]
            if container is None:
                tensor.data = moved
            else:
                container[key] = moved

    def _elsewhere(self) -> Iterator[tuple[Any, Any, Tensor]]:
        """Yield (container, key, tensor) of the tensors that the trials want on the device; a parameter has no container."""
        for container, key, tensor in [*self._places(), *self._state_places()]:
            if tensor.device != self._device:
                yield container, key, tensor

    def _places(self) -> Iterator[tuple[Any, Any, Tensor]]:
        for parameter in dict.fromkeys(self._parameters()):
            yield None, None, parameter
        for module in self._model.modules():
            if isinstance(module, torch.jit.ScriptModule):  # pragma: no cover: needs a card, torch moves such buffers nowhere else
                yield from ((None, None, buffer) for buffer in module.buffers(recurse=False))
                continue
            for table in (vars(module), module._buffers):
                for key, value in table.items():
                    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                        yield table, key, value

    def _state_places(self) -> Iterator[tuple[Any, Any, Tensor]]:
        todo: list[Any] = [dict(self._optimizer.state)] if self._optimizer is not None else []
        while todo:
            held = todo.pop()
            for key, value in held.items() if isinstance(held, dict) else enumerate(held):
                # The step count is kept on the host by default, wherever the parameter is.
                if isinstance(value, Tensor) and key != "step":
                    yield held, key, value
                elif isinstance(value, (dict, list)):
                    todo.append(value)


def _refuse_lazy(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            raise InvalidRequest(
                f"The model's {kind} {name!r} is not initialised yet (a lazy module). Run the model once on a sample, then call again."
            )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a Ctrl-C wait until the end."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    came: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if came:
            usual(*came[0])


def resident_bytes(model: nn.Module, optimizer: Optimizer | None) -> int:
    """Return the bytes of parameters, buffers, gradients and optimizer state held now, shared storage counted once."""
    storages: dict[int, int] = {}
    for tensor in _tensors(model, optimizer):
        for part in parts(tensor):
            if part.layout is torch.strided:
                storage = part.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            else:  # oneDNN's own, which has no storage
                storages[id(tensor)] = part.numel() * part.element_size()
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
