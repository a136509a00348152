"""What is run: a model, how its batches are made, its loss and its optimizer, checked before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autobatch.core.errors import InvalidRequest, WorkloadFailed
from autobatch.core.scaling import MARK
from autobatch.workload.batches import UNFED, Feeding, dataset_size, feeding_of, take_sample
from autobatch.workload.held import held_by

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
MODES = ("train", "eval")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step, in the parts that are measured apart.

    Attributes:
        model: the module; its parameters are what the optimizer updates.
        make_batch: ``make_batch(n)`` returns a batch of ``n`` rows, on any device.
        loss: forward pass and loss of one batch.
        optimizer: the optimizer, ``None`` for forward and backward only.
        mode: ``"train"`` or ``"eval"`` (forward only, no gradients).
        precision: autocast dtype by name, ``None`` for none.
        dataset_size: rows in the data set, where one was given.
        feeding: how the data loader keeps batches ready, where one was given.
        notes: what the user should know about how the step was built.
    """

    model: nn.Module
    make_batch: Callable[[int], Any]
    loss: Loss
    optimizer: Optimizer | None = None
    mode: str = "train"
    precision: str | None = None
    dataset_size: int | None = None
    feeding: Feeding = UNFED
    notes: tuple[str, ...] = ()

    @property
    def group_lrs(self) -> tuple[float, ...]:
        """Learning rate of each of the optimizer's parameter groups."""
        return tuple(float(group["lr"]) for group in self.optimizer.param_groups if "lr" in group) if self.optimizer else ()

    @property
    def held(self) -> tuple[Any, ...]:
        """What the step changes beside the model and the optimizer."""
        return held_by(*self.loss.functions, self.make_batch)

    @property
    def group_options(self) -> tuple[dict[str, float], ...]:
        """What a change of the batch size may scale beside the learning rates, by parameter group."""
        return tuple(options_of(group, type(self.optimizer).__name__) for group in self.optimizer.param_groups) if self.optimizer else ()

    @property
    def batch_norm_momentum(self) -> float | None:
        """Momentum of the model's first batch normalisation, ``None`` without one or where it averages over all batches."""
        found = (module.momentum for module in self.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
        return next(found, None)

    @property
    def has_batch_norm(self) -> bool:
        """Whether the model normalises over the rows of a batch."""
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())


def options_of(group: Mapping[str, Any], optimizer_name: str) -> dict[str, float]:
    """Return the options of a parameter group that a change of the batch size may scale, as plain numbers."""
    betas = group.get("betas") or ()
    decoupled = group.get("decoupled_weight_decay", "adamw" in optimizer_name.lower())
    found = {
        **{f"beta{index}": beta for index, beta in enumerate(betas[:2], start=1)},
        **{name: group[name] for name in ("alpha", "eps") if name in group},
        "decoupled_weight_decay" if decoupled else "weight_decay": group.get("weight_decay"),
    }
    return {name: float(value) for name, value in found.items() if isinstance(value, (int, float, Tensor)) and math.isfinite(value)}


def build_workload(
    model: nn.Module,
    sample: Any = None,
    *,
    loss_fn: Callable[..., Tensor] | None = None,
    optimizer: Optimizer | OptimizerFactory | None = None,
    step: Callable[[nn.Module, Any], Tensor] | None = None,
    make_batch: Callable[[int], Any] | None = None,
    mode: str = "train",
    precision: str | None = None,
) -> Workload:
    """Return the step that ``find``'s arguments describe.

    Raises:
        InvalidRequest: an argument cannot be meant; the message says which and what to give.
    """
    _check_choices(model, mode, precision)
    instance = _make_optimizer(model, optimizer, mode)
    common = {"model": model, "loss": Loss(loss_fn, step, mode), "optimizer": instance, "mode": mode, "precision": precision}
    notes = _scaled_already(instance)
    if make_batch is not None:
        return Workload(make_batch=make_batch, dataset_size=dataset_size(sample), feeding=feeding_of(sample), notes=notes, **common)  # type: ignore[arg-type]
    taken = take_sample(sample)
    return Workload(make_batch=taken.grow, dataset_size=taken.dataset_size, feeding=taken.feeding, notes=(*notes, *taken.notes), **common)  # type: ignore[arg-type]


def _scaled_already(optimizer: Optimizer | None) -> tuple[str, ...]:
    scaled = [group[MARK] for group in optimizer.param_groups if MARK in group] if optimizer is not None else []
    if not scaled:
        return ()
    return (
        f"the optimizer's learning rate was scaled by plan.apply already (× {scaled[0]:.6g}) and was taken for the one tuned at "
        "base_batch_size; give base_lr= where that is another",
    )


def _check_choices(model: Any, mode: str, precision: str | None) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidRequest(
            f"model is a {type(model).__name__}; a torch.nn.Module is wanted. Give the model itself, not its class or output."
        )
    if mode not in MODES:
        raise InvalidRequest(f"mode is {mode!r}; known: {', '.join(MODES)}.")
    if precision is not None and precision not in PRECISIONS:
        raise InvalidRequest(f"precision is {precision!r}; known: {', '.join(PRECISIONS)} (or leave it out for the model's own).")
    if mode == "train" and not any(p.requires_grad for p in model.parameters()):
        raise InvalidRequest(
            "No parameter of the model requires a gradient, so there is no training step to measure. "
            "Call model.requires_grad_(True), or probe inference with mode='eval'."
        )


def _make_optimizer(model: nn.Module, optimizer: Any, mode: str) -> Optimizer | None:
    if optimizer is None or mode == "eval":
        return None
    if not isinstance(optimizer, Optimizer):
        if not callable(optimizer):
            raise InvalidRequest(f"optimizer is a {type(optimizer).__name__}; give an Optimizer or a function params -> Optimizer.")
        optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
        if not isinstance(optimizer, Optimizer):
            raise InvalidRequest(f"optimizer(params) returned a {type(optimizer).__name__}; it must return a torch.optim.Optimizer.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InvalidRequest(
            "LBFGS runs the model several times a step, through a closure; a trial runs it once. Leave optimizer= out and add what LBFGS "
            f"keeps to the margin: {optimizer.param_groups[0]['history_size']} × 2 copies of the parameters."
        )
    own = set(model.parameters())
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(p in own for p in stepped):
        raise InvalidRequest(
            f"None of the optimizer's {len(stepped)} parameters belongs to the model: it was built for another one. "
            "Build it with model.parameters() of the model that you pass."
        )
    return optimizer


class Loss:
    """Forward pass and loss of one batch, keeping what a plain training loop would keep.

    Attributes:
        stood_in: whether the sum of the outputs had to stand in for a loss.
        functions: what was given for the loss and for the step.
    """

    def __init__(self, loss_fn: Callable[..., Tensor] | None, step: Callable[[nn.Module, Any], Tensor] | None, mode: str) -> None:
        self._loss_fn, self._step, self._train = loss_fn, step, mode == "train"
        self.stood_in = False
        self.functions = (loss_fn, step)

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor | None, Any]:
        """Return the scalar loss (``None`` in eval mode) and the model's output, which a loop holds until the next batch.

        Raises:
            WorkloadFailed: the loss cannot be trained on.
        """
        if self._step is not None:
            result = self._step(model, batch)
            return (checked_loss(result, "step"), None) if self._train else (None, result)
        if isinstance(batch, Mapping):
            output, target = model(**batch), batch
        elif isinstance(batch, (tuple, list)):
            inputs, target = _pair(batch)
            output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        else:
            output, target = model(batch), None
        return (self._of(output, target), output) if self._train else (None, output)

    def _of(self, output: Any, target: Any) -> Tensor:
        if self._loss_fn is not None:
            return checked_loss(self._loss_fn(output) if target is None else self._loss_fn(output, target), "loss_fn")
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if own is not None:
            return checked_loss(own, "the model's .loss")
        floating = [leaf for leaf in _tensors(output) if leaf.is_floating_point()]
        if not floating:
            raise WorkloadFailed("The model returned no floating-point tensor to take a gradient of. Give loss_fn= or step=.")
        self.stood_in = True
        return checked_loss(torch.stack([leaf.float().sum() for leaf in floating]).sum(), "the sum of the model's outputs")


def _pair(batch: tuple[Any, ...] | list[Any]) -> tuple[Any, Any]:
    if len(batch) != 2:
        raise InvalidRequest(
            f"The sample has {len(batch)} parts; with loss_fn it must be (inputs, target). Give step=, a function (model, batch) -> loss."
        )
    return batch[0], batch[1]


def checked_loss(loss: Any, source: str) -> Tensor:
    """Return ``loss`` when it can be trained on.

    Raises:
        WorkloadFailed: it is no tensor, not a scalar, or carries no gradient.
    """
    if not isinstance(loss, Tensor):
        raise WorkloadFailed(f"{source} returned a {type(loss).__name__}; a scalar tensor is wanted. Return the loss itself.")
    if loss.numel() != 1:
        raise WorkloadFailed(
            f"{source} returned a tensor of shape {tuple(loss.shape)}; a scalar is wanted. Reduce it, for example with .mean()."
        )
    if not loss.requires_grad:
        raise WorkloadFailed(
            f"{source} returned a loss that needs no gradient, so there is no backward pass to measure. "
            "Look for torch.no_grad(), .detach() or .item() in the step; for inference, use mode='eval'."
        )
    return loss


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [leaf for item in value for leaf in _tensors(item)] if isinstance(value, (list, tuple)) else []
