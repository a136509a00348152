"""A model that holds whatever a model can hold."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from picture import everything
from torch import nn
from torch.optim.swa_utils import AveragedModel


class Busy(nn.Module):
    """A model with every kind of state that a step can change."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.norm_tied = nn.Parameter(torch.randn(6, 6))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(6))
        self.plain = torch.zeros(6)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen = x.detach()
        self.plain += 1
        self.mean = self.mean * 0.9 + x.mean(0).detach() * 0.1  # replaced, not changed in place
        return self.second(torch.dropout(self.norm(self.first(self.frozen(x))), 0.5, True))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()


class Helper:
    """An object of a library that keeps a moving average."""

    def __init__(self) -> None:
        self.count, self.shadow = 0, [torch.ones(6)]


class Slotted:
    __slots__ = ("count", "late")

    def __init__(self) -> None:
        self.count = 0


def counting() -> Callable[[], None]:
    count = 0

    def up() -> None:
        nonlocal count
        count += 1

    return up


def busiest() -> tuple[Busy, torch.optim.Optimizer, list[Any]]:
    """Return a model that holds whatever can be held, its optimizer, and what no walk over attributes would show."""
    torch.manual_seed(0)
    model = Busy()
    model.means, model.table, model.deque, model.set = [torch.zeros(6)], {"early": torch.zeros(6)}, collections.deque([1], 3), {1}
    model.array, model.bytes, model.helper, model.slotted, model.count = np.zeros(3), bytearray(b"ab"), Helper(), Slotted(), counting()
    model.generator, model.python = torch.Generator(), random.Random(0)
    model.numpy, model.old_numpy = np.random.default_rng(0), np.random.RandomState(0)
    model.average = AveragedModel(model.frozen)
    model.register_buffer("expanded", torch.zeros(1).expand(6))
    model.register_buffer("slice", torch.zeros(6, 6)[::2, 1])
    model.register_buffer("conjugate", torch.ones(3, dtype=torch.complex64).conj())
    with torch.inference_mode():
        model.register_buffer("inferred", torch.zeros(3))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.learned = torch.ones(3, requires_grad=True)
    model.teachers = [nn.Linear(6, 6)]
    foreign = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([*(p for p in model.parameters() if p.requires_grad), foreign])
    train(model, optimizer)
    model.last = None
    optimizer.state[model.second.bias]["history"] = [torch.zeros(2)]
    return model, optimizer, [model.count.__closure__, foreign]


def look(model: Busy, optimizer: torch.optim.Optimizer, hidden: list[Any]) -> dict[str, Any]:
    slotted = {name: getattr(model.slotted, name) for name in Slotted.__slots__ if hasattr(model.slotted, name)}
    unseen = {"closure": hidden[0][0].cell_contents, "slots": slotted, "old numpy": repr(model.old_numpy.get_state())}
    return everything(model, optimizer, vars(model.count)) | unseen | {"class": type(model.second), "bytes": bytes(model.bytes)}
