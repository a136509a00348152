"""The gradient noise scale of a model, measured on its own gradients: from a loader, or inside a training loop that accumulates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from autobatch.core.errors import InvalidRequest
from autobatch.core.noise_scale import FEW, NoiseScale, estimate_noise_scale
from autobatch.workload.batches import map_tensors, take_sample, to_device
from autobatch.workload.state import Snapshot, keep_random_state
from autobatch.workload.workload import Loss

PARAMETERS = ("all", "layernorm")


class NoiseMeter:
    """Reads the norms of micro-gradients as a training loop makes them, by hooks on the parameters; no gradient is copied.

        with autobatch.NoiseMeter(model) as meter:
            for window in windows:
                for inputs, target in window:                  # gradient accumulation, at least two micro-batches in all ranks
                    loss_fn(model(inputs), target).backward()
                    meter.micro_batch(len(inputs))
                meter.window()                                 # before clipping
                optimizer.step()
                optimizer.zero_grad()
        noise = meter.noise_scale()

    Gradients must be zero or ``None`` where a window begins, and a loss must be a mean over rows, or a sum; dividing it by the number of
    micro-batches changes nothing, nor does a gradient scaler's factor while it stays. Under ``DistributedDataParallel`` a rank's own
    gradients are read before they are reduced, the reduced ones by ``window``; every rank must make the same calls. Nothing waits for the
    device before ``noise_scale``.

    Args:
        model: the module, or its ``DistributedDataParallel`` wrapper.
        parameters: ``"all"``, or ``"layernorm"`` for those of LayerNorm and RMSNorm alone (Gray et al. 2024, arXiv 2411.00999).

    Raises:
        InvalidRequest: no such parameter requires a gradient, or the parameters are sharded.
    """

    def __init__(self, model: nn.Module, *, parameters: str = "all") -> None:
        self._group = model.process_group if isinstance(model, DistributedDataParallel) else None
        self._kind, self._parameters = parameters, _chosen(model, parameters)
        self._norms: list[Tensor] = []
        self._micro: list[Tensor] = []
        self._rows: list[int] = []
        self._windows: list[Tensor] = []
        self._shape: tuple[int, int] | None = None
        self._unequal = 0
        self._hooks = [parameter.register_hook(self._hook) for parameter in self._parameters]  # type: ignore[no-untyped-call]

    def __enter__(self) -> NoiseMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks off; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def micro_batch(self, rows: int) -> None:
        """Say that the backward pass of a micro-batch of ``rows`` rows has ended.

        Raises:
            InvalidRequest: no gradient of the model's parameters was computed since the last call.
        """
        if not self._norms:
            raise InvalidRequest(
                "No gradient was computed since the last micro-batch. Call micro_batch(rows) after loss.backward(), with the meter's model."
            )
        self._micro.append(_sum_of_squares(self._norms))
        self._rows.append(rows)
        self._norms.clear()

    def window(self) -> None:
        """Say that the gradients of a window are complete: call it before they are clipped, used and set to zero.

        A window of another shape than the first, such as the last of an epoch, is left out.
        """
        shape = (len(self._rows), self._rows[0] if self._rows else 0)
        even = all(rows == shape[1] for rows in self._rows)
        self._shape = self._shape or (shape if even and self._rows else None)
        if even and shape == self._shape:
            whole = _sum_of_squares([_norm(parameter.grad) for parameter in self._parameters if parameter.grad is not None])
            self._windows.append(torch.stack([torch.stack(self._micro).mean(), whole / shape[0] ** 2]))
        else:
            self._unequal += 1
        self._micro.clear()
        self._rows.clear()

    def noise_scale(self) -> NoiseScale:
        """Return what the windows so far tell.

        Raises:
            InvalidRequest: they are too few, or their micro-gradients too few or all alike.
        """
        micro_batches, rows = self._shape or (FEW, 0)
        windows = torch.stack(self._windows) if self._windows else torch.empty(0, 2)
        if self._group is not None and self._windows:
            ranks = torch.distributed.get_world_size(self._group)
            torch.distributed.all_reduce(windows, group=self._group)
            windows, micro_batches = windows / ranks, micro_batches * ranks
        notes = [f"{self._unequal} of the windows had other micro-batches than the first and were left out"] if self._unequal else []
        squares = [(q, p) for q, p in windows.tolist()]
        return estimate_noise_scale(squares, micro_batches=micro_batches, rows=rows, parameters=self._kind, notes=notes)

    def _hook(self, gradient: Tensor) -> None:
        self._norms.append(_norm(gradient))


def noise_scale(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: Callable[..., Tensor] | None = None,
    *,
    step: Callable[[nn.Module, Any], Tensor] | None = None,
    micro_batches: int = FEW,
    windows: int = 16,
    parameters: str = "all",
) -> NoiseScale:
    """Return the simple noise scale of ``model`` on the batches of ``loader``: the batch size beyond which rows bring less and less.

    φ = tr Σ / |G|² (McCandlish et al. 2018, arXiv 1812.06162), from ``windows`` × ``micro_batches`` backward passes on different batches.
    Nothing is trained: parameters, buffers, gradients, modes and random states are left bit for bit as they were; batches move to the
    model's device. Dropout and BatchNorm act as in training. For mixed precision, call it under ``torch.autocast``.

    Args:
        model: the module, or its ``DistributedDataParallel`` wrapper; then every rank calls this with its own rows.
        loader: batches of equal rows, each with different rows; begun again when it ends. A last smaller batch is passed over.
        loss_fn: ``loss_fn(model(inputs), target)``, a mean over rows; without it the output's ``.loss``.
        step: ``step(model, batch) -> loss``, in place of forward and loss.
        micro_batches: batches in a window, per rank; 8 or more over all ranks.
        windows: windows, 2 or more; the interval narrows with their square root.
        parameters: ``"all"``, or ``"layernorm"`` for those of LayerNorm and RMSNorm alone.

    Raises:
        InvalidRequest: an argument cannot be meant, or the loader repeats a batch or gives too few.
        WorkloadFailed: the loss cannot be trained on.
        Exception: whatever the user's code raises, as it is.
    """
    _check_counts(model, micro_batches, windows)
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    loss, device = Loss(loss_fn, step, "train"), _device(plain)
    gradients = [parameter.grad for parameter in plain.parameters()]
    with contextlib.ExitStack() as stack:
        stack.enter_context(keep_random_state(loader))
        # DDP may reduce into the memory of gradients that are there already, so their bytes are kept too.
        snapshot = Snapshot(plain, None, device, also=(loss_fn, step, gradients))
        stack.callback(snapshot.restore)
        torch.set_grad_enabled(True)
        plain.train()
        meter = stack.enter_context(NoiseMeter(model, parameters=parameters))
        for window in _windows(loader, micro_batches, windows):
            for index, (batch, rows) in enumerate(window):
                with _unsynchronised(model, index < len(window) - 1):
                    _backward(model, loss, to_device(batch, device))
                meter.micro_batch(rows)
            meter.window()
            snapshot.drop_created()
        return meter.noise_scale()


def _check_counts(model: nn.Module, micro_batches: int, windows: int) -> None:
    ranks = torch.distributed.get_world_size(model.process_group) if isinstance(model, DistributedDataParallel) else 1
    for name, value, least in (("windows", windows, 2), ("micro_batches", micro_batches, -(-FEW // ranks))):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidRequest(f"{name} is {value!r}; {least} or more are needed to tell the gradient from its noise.")


def _unsynchronised(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    if wanted and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def _backward(model: nn.Module, loss: Loss, batch: Any) -> None:
    value, _ = loss(model, batch)
    if value is None or loss.stood_in:
        raise InvalidRequest("There is no loss to take gradients of. Give loss_fn= or step=, or a model that returns .loss.")
    value.backward()  # type: ignore[no-untyped-call]


def _windows(loader: Iterable[Any], micro_batches: int, windows: int) -> Iterator[list[tuple[Any, int]]]:
    """Yield windows of batches with their rows, each from one pass over ``loader``, so that no row comes twice in it.

    Fewer than ``windows`` where a second pass begins like the first: it would say nothing new.

    Raises:
        InvalidRequest: a pass gives no whole window, or the same batch twice in a row.
    """
    made, size, first = 0, 0, None
    while made < windows:
        before, window = made, list[tuple[Any, int]]()
        for batch in loader:
            if made == before and not window:
                if made >= 2 and _equal(batch, first):
                    return
                first = batch
            rows = take_sample(batch).rows
            size = size or rows
            if rows != size:
                continue
            if window and _equal(batch, window[-1][0]):
                raise InvalidRequest(
                    "The loader gave the same batch twice in a row: without different rows there is no noise to measure. "
                    "Give the loader that you train with."
                )
            window.append((batch, rows))
            if len(window) == micro_batches:
                yield window
                made, window = made + 1, []
                if made == windows:
                    return
        if made == before:
            raise InvalidRequest(
                f"A pass over the loader gave {len(window)} batches of {size} rows; a window needs {micro_batches} different ones. "
                "Give a loader with a smaller batch_size, or a data set with more rows."
            )


def _equal(one: Any, other: Any) -> bool:
    mine, others = _tensors(one), _tensors(other)
    return len(mine) == len(others) and all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def take(leaf: Tensor) -> Tensor:
        found.append(leaf)
        return leaf

    map_tensors(batch, take)
    return found


def _device(model: nn.Module) -> torch.device:
    devices = {tensor.device for tensor in model.parameters()}
    if len(devices) > 1:
        raise InvalidRequest(
            f"The model's parameters are on {len(devices)} devices. Use autobatch.NoiseMeter(model) in your own loop, which moves nothing."
        )
    return next(iter(devices), torch.device("cpu"))


def _chosen(model: nn.Module, parameters: str) -> list[nn.Parameter]:
    if parameters not in PARAMETERS:
        raise InvalidRequest(f"parameters is {parameters!r}; known: {', '.join(PARAMETERS)}.")
    modules = [m for m in model.modules() if parameters == "all" or type(m).__name__.endswith(("LayerNorm", "RMSNorm"))]
    found = dict.fromkeys(p for module in modules for p in module.parameters(recurse=False) if p.requires_grad)
    if not found:
        raise InvalidRequest(f"No parameter to measure (parameters={parameters!r}): none of the model's requires a gradient.")
    if any(type(parameter).__name__ == "DTensor" for parameter in found):
        raise InvalidRequest("The parameters are sharded (DTensor): no rank has a whole gradient. Measure before sharding, or under DDP.")
    return list(found)


def _norm(gradient: Tensor) -> Tensor:
    """Return the norm as one fp64 number on the device: slices in single precision, their norms, which are few, in double."""
    gradient = gradient.detach()
    if gradient.is_sparse:
        gradient = gradient.coalesce()._values()
    if gradient.dim() > 1:
        gradient = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.promote_types(gradient.dtype, torch.float32))
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    return norm


def _sum_of_squares(norms: list[Tensor]) -> Tensor:
    return torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()
