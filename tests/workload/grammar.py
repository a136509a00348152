"""Random small models with every kind of state that a step changes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

WIDTH = 4


class Counter(nn.Module):
    """Counts its calls in plain attributes, a list, a dictionary and an array."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen, self.by_size, self.array = 0, [], {"rows": 0}, np.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x.detach())
        self.by_size["rows"] += len(x)
        self.array += 1
        self.last = x  # keeps a graph, and is no attribute before the first call
        return x


class Ema(nn.Module):
    """A running mean in tensors that are no buffers: in a list, in a dictionary, replaced and changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.means, self.table, self.plain = [torch.zeros(WIDTH)], {"scale": torch.ones(WIDTH)}, torch.zeros(WIDTH)
        self.register_buffer("buffer", torch.zeros(1).expand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().mean(0)
        self.means[0].mul_(0.9).add_(mean)
        self.table["scale"] = self.table["scale"] * 0.9 + mean
        self.plain.data = self.plain + mean
        self.buffer = self.buffer * 0.9 + mean
        return x - self.means[0]


class Shape(nn.Module):
    """A layer that wants another shape: channels, or steps in time."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        kinds: dict[str, Callable[[], nn.Module]] = {
            "conv1d": lambda: nn.Conv1d(1, 1, 3, padding=1),
            "conv2d": lambda: nn.Conv2d(1, 2, 1),
            "gru": lambda: nn.GRU(1, 1, batch_first=True),
        }
        self.kind, self.layer = kind, kinds[kind]()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "conv2d":
            return self.layer(x.view(-1, 1, 2, 2)).sum(1).flatten(1)
        if self.kind == "gru":
            return self.layer(x.unsqueeze(2))[0].squeeze(2)
        return self.layer(x.unsqueeze(1)).squeeze(1)


class Looked(nn.Module):
    """An embedding, looked up by what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, WIDTH, max_norm=1.0)  # which changes its rows in the forward pass

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table((x.detach()[:, 0].nan_to_num() * 4).long().remainder(8))


class Noise(nn.Module):
    """Noise from generators of its own, and from everybody's."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.python, self.numpy = torch.Generator(), random.Random(3), np.random.default_rng(3)

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.python.random() + self.numpy.random() + random.random() + np.random.rand()
        return x + torch.randn(WIDTH, generator=self.own) * 0.1 + drawn * 0.01


class Averaged(nn.Module):
    """A layer and its moving average, brought up to date by every call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.average = AveragedModel(self.layer, use_buffers=True).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.average.update_parameters(self.layer)
        return self.layer(x)


class Growing(nn.Module):
    """Makes a layer and a buffer at its first call, replaces a parameter's data, and adds hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "grown"):
            self.grown = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("late", torch.zeros(1))
            self.register_forward_hook(lambda *_: None)
            self.scale.register_hook(lambda gradient: gradient * 2)
        self.scale.data = self.scale.data.clone()
        return self.grown(x) * self.scale


def _frozen() -> nn.Module:
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).requires_grad_(False)
    return layer.eval()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "conv1d": lambda: Shape("conv1d"),
    "conv2d": lambda: Shape("conv2d"),
    "gru": lambda: Shape("gru"),
    "batch_norm": lambda: nn.BatchNorm1d(WIDTH),
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "group_norm": lambda: nn.GroupNorm(2, WIDTH),
    "dropout": lambda: nn.Dropout(0.3),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "embedding": Looked,
    "counter": Counter,
    "ema": Ema,
    "noise": Noise,
    "averaged": Averaged,
    "growing": Growing,
    "frozen": _frozen,
}


class Nested(Optimizer):
    """An optimizer that keeps tensors in lists and dictionaries, and a count in an attribute."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})
        self.steps, self.norms = 0, [torch.zeros(())]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                history = state.setdefault("history", [])
                history.append(p.grad.clone())
                moments = state.setdefault("moments", {"first": torch.zeros_like(p), "count": 0})
                moments["first"].lerp_(p.grad, 0.1)
                moments["count"] += 1
                self.norms[0] += p.grad.norm()
                p.add_(moments["first"], alpha=-group["lr"])


OPTIMIZERS: dict[str, Callable[[Any], Optimizer] | None] = {
    "none": None,
    "sgd": lambda p: SGD(p, lr=0.01),
    "momentum": lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adam_one_by_one": lambda p: torch.optim.Adam(p, foreach=False),
    "adamw": AdamW,
    "adamw_tensor_lr": lambda p: AdamW(p, lr=torch.tensor(0.001), foreach=False),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "nested": Nested,
}


class Fault(TorchDispatchMode):
    """Raises at the ``after``-th operator."""

    def __init__(self, after: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = after, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return func(*args, **(kwargs or {}))


@dataclasses.dataclass
class Built:
    """A model of the grammar with its optimizer, and a scheduler on top."""

    model: nn.Module
    optimizer: Optimizer | None
    scheduler: Any


def build(layers: list[str], optimizer: str, *, resumed: bool, groups: bool, scheduled: bool, tied: bool, gradients: bool) -> Built:
    """Return a model of ``layers`` with what was asked for; ``resumed`` has trained two steps, ``gradients`` are left in place."""
    head = nn.Linear(WIDTH, WIDTH)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(LAYERS[name]() for name in layers), head)
    if tied:
        head.weight = model[0].weight
    wanted = [p for p in model.parameters() if p.requires_grad]
    make = OPTIMIZERS[optimizer]
    own = make([{"params": wanted[:1]}, {"params": wanted[1:], "lr": 0.02}] if groups else wanted) if make is not None else None
    scheduler = torch.optim.lr_scheduler.ExponentialLR(own, 0.9) if own is not None and scheduled else None
    if resumed:
        for _ in range(2):
            model.zero_grad()
            model(torch.randn(3, WIDTH)).square().mean().backward()
            if own is not None:
                own.step()
            if scheduler is not None:
                scheduler.step()
    model.zero_grad()
    if gradients:
        model(torch.randn(3, WIDTH)).square().mean().backward()
    return Built(model, own, scheduler)
