"""Small models whose memory is real, for a processor held to a limit: each answer is some hundred rows, each step well under a second."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.core.units import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A training step and the memory it is held to.

    Attributes:
        name: what it is called in the results.
        build: returns the module.
        sample: returns a batch of a few rows, ``(inputs, target)``.
        loss: ``loss(output, target)``.
        optimizer: ``params -> Optimizer``.
        limit: bytes that tensors may take.
        device: torch's name of where it runs.
        precision: ``"bf16"`` for autocast, else ``None``.
    """

    name: str
    build: Callable[[], nn.Module]
    sample: Callable[[], tuple[Any, Tensor]]
    loss: Callable[[Any, Tensor], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    limit: int
    device: str = "cpu"
    precision: str | None = None


adamw = partial(torch.optim.AdamW, lr=1e-4)
sgd = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)


class Residual(nn.Module):
    """Two convolutions with batch normalisation, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class UNet(nn.Module):
    """Two levels down, two up, with what was seen on the way down beside it."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        c = channels
        self.enter, self.down, self.bottom = (self._block(*pair) for pair in ((1, c), (c, 2 * c), (2 * c, 4 * c)))
        self.up, self.leave = self._block(6 * c, 2 * c), self._block(3 * c, c)
        self.head = nn.Conv2d(c, 1, 1)

    @staticmethod
    def _block(into: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(into, out, 3, padding=1), nn.GroupNorm(2, out), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        first = self.enter(x)
        second = self.down(nn.functional.avg_pool2d(first, 2))
        third = self.bottom(nn.functional.avg_pool2d(second, 2))
        up = self.up(torch.cat([nn.functional.interpolate(third, scale_factor=2.0), second], 1))
        out: Tensor = self.head(self.leave(torch.cat([nn.functional.interpolate(up, scale_factor=2.0), first], 1)))
        return out


class Decoder(nn.Module):
    """A small transformer over tokens, with dropout."""

    def __init__(self, vocabulary: int = 128, width: int = 64, length: int = 24) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.embed(tokens) + self.place))
        return out


class Recurrent(nn.Module):
    """An LSTM over a series, and a linear layer."""

    def __init__(self, features: int = 16, width: int = 64) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(features, width, 2, batch_first=True), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x)[0][:, -1])
        return out


class Recommender(nn.Module):
    """A large table and a small net: parameters and optimizer state are nearly all the memory."""

    def __init__(self, items: int = 40_000, width: int = 32) -> None:
        super().__init__()
        self.table, self.net = nn.Embedding(items, width), nn.Sequential(nn.Linear(8 * width, 256), nn.ReLU(), nn.Linear(256, 1))

    def forward(self, items: Tensor) -> Tensor:
        out: Tensor = self.net(self.table(items).flatten(1))
        return out


def _each_token(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.transpose(1, 2), target)


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Dropout(0.1), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 10))


def _residual() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Residual(16), nn.AvgPool2d(4), Residual(16), nn.Flatten(), nn.Linear(16 * 36, 10))


def _images(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(4, *shape), torch.randint(10, (4,))


PROCESSOR: tuple[Model, ...] = (
    Model(
        name="perceptron",
        build=_perceptron,
        sample=lambda: _images(512),
        loss=nn.functional.cross_entropy,
        optimizer=adamw,
        limit=96 * MIB,
    ),
    Model(
        name="resnet", build=_residual, sample=lambda: _images(3, 24, 24), loss=nn.functional.cross_entropy, optimizer=sgd, limit=128 * MIB
    ),
    Model(
        name="transformer",
        build=Decoder,
        sample=lambda: (torch.randint(128, (4, 24)), torch.randint(128, (4, 24))),
        loss=_each_token,
        optimizer=adamw,
        limit=128 * MIB,
    ),
    Model(
        name="unet",
        build=UNet,
        sample=lambda: (torch.randn(4, 1, 24, 24), torch.randn(4, 1, 24, 24)),
        loss=nn.functional.mse_loss,
        optimizer=adamw,
        limit=128 * MIB,
    ),
    Model(
        name="lstm",
        build=Recurrent,
        sample=lambda: (torch.randn(4, 40, 16), torch.randn(4, 1)),
        loss=nn.functional.mse_loss,
        optimizer=adamw,
        limit=128 * MIB,
    ),
    Model(
        name="recommender",
        build=Recommender,
        sample=lambda: (torch.randint(40_000, (4, 8)), torch.randn(4, 1)),
        loss=nn.functional.mse_loss,
        optimizer=adamw,
        limit=64 * MIB,
    ),
)


def find(name: str, device: str = "cpu", limit: int | None = None) -> Model:
    """Return the model called ``name`` on ``device``, held to ``limit`` bytes instead of its own limit where one is given."""
    if device == "cpu":
        models = PROCESSOR
    else:
        from benchmarks.peers.cuda_models import CARD as models
    spec = next(model for model in models if model.name == name)
    return spec if limit is None else replace(spec, limit=limit)
