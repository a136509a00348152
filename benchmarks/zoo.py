"""The zoo: small models of many kinds, crossed with precisions and optimizers; what recordings of real cards are made of.

Every entry is one named training step, made anew at each call, in plain torch, from random weights. The same entry runs on a card to be
recorded and is traced without one, so that the two can be held against each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from autobatch.workload.batches import map_tensors, take_sample
from benchmarks import zoo_text, zoo_vision
from benchmarks.zoo_blocks import Parts

# What widths and sides are multiplied by on a card.
CARD_SCALE = 4

_FAMILIES: dict[str, Callable[..., Parts]] = {
    "plain_conv": zoo_vision.plain_conv,
    "resnet": zoo_vision.resnet,
    "mobile": zoo_vision.mobile,
    "dense": zoo_vision.dense,
    "vit": zoo_vision.vit,
    "unet": zoo_vision.unet,
    "autoencoder": zoo_vision.autoencoder,
    "mixer": zoo_vision.mixer,
    "detection": zoo_vision.detection,
    "gpt": zoo_text.gpt,
    "bert": zoo_text.bert,
    "t5": zoo_text.t5,
    "llama": zoo_text.llama,
    "lstm": zoo_text.lstm,
    "gru": zoo_text.gru,
    "graph": zoo_text.graph,
    "mlp": zoo_text.mlp,
}
_OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=1e-3),
    "momentum": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=1e-4),
    "adam_foreach": functools.partial(torch.optim.Adam, lr=1e-4, foreach=True),
    "adam_loop": functools.partial(torch.optim.Adam, lr=1e-4, foreach=False),
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-4),
    "adamw_fused": functools.partial(torch.optim.AdamW, lr=1e-4, fused=True),
}
# Family, precision and optimizer, then what else is done; one entry a line, its name is the line with dashes.
_LINES = """
plain_conv fp32 sgd
plain_conv bf16 adam
plain_conv fp16 momentum
resnet fp32 momentum
resnet bf16 momentum
resnet fp16 adamw
resnet bf16 momentum channels_last
resnet bf16 adamw checkpointed
resnet fp32 momentum compiled
mobile fp32 momentum
mobile bf16 adamw channels_last
dense fp32 momentum
dense fp16 sgd
dense fp32 sgd checkpointed
vit fp32 adamw
vit bf16 adamw
vit fp16 adamw_fused
vit bf16 adamw checkpointed
vit bf16 adamw compiled
unet fp32 adam
unet bf16 adam_loop
unet fp16 adam channels_last
autoencoder fp32 adam
autoencoder bf16 momentum
mixer fp32 sgd
mixer bf16 adamw_fused
detection fp32 momentum
detection bf16 adamw
gpt fp32 adamw
gpt bf16 adamw
gpt fp16 adam_foreach
gpt fp32 adamw checkpointed
gpt bf16 adamw checkpointed
gpt bf16 adamw_fused compiled
bert fp32 adamw
bert bf16 adamw_fused
bert fp16 momentum
t5 fp32 adamw
t5 bf16 adam
llama fp32 adamw
llama bf16 adamw_fused
llama bf16 adamw checkpointed
llama bf16 sgd
lstm fp32 adam
lstm fp16 sgd
gru fp32 momentum
gru bf16 adam
graph fp32 adam
graph bf16 adamw
mlp fp32 sgd
mlp fp32 adam_loop
mlp bf16 adamw_fused
mlp fp32 adamw compiled
"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training step.

    Attributes:
        arguments: of ``autobatch.find`` and ``autobatch.workload.workload.build_workload``.
        batch_sizes: rows to record at the scale of a card.
        compiled: whether the model is to be compiled where it is recorded; ``arguments`` hold the plain one, which is what is traced.
    """

    arguments: dict[str, Any]
    batch_sizes: tuple[int, ...]
    compiled: bool


def recipe(name: str, scale: int = 1) -> Recipe:
    """Return the entry called ``name`` with its widths and sides multiplied by ``scale``."""
    family, precision, optimizer, *extras = name.split("-")
    parts = _FAMILIES[family](scale, **({"checkpointed": True} if "checkpointed" in extras else {}))
    arguments = {
        "model": parts.model,
        "sample": parts.sample,
        **parts.loss,
        "optimizer": _OPTIMIZERS[optimizer],
        "precision": precision,
    }
    if "channels_last" in extras:
        parts.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        arguments["make_batch"] = _channels_last(parts.sample)
    return Recipe(arguments=arguments, batch_sizes=parts.batch_sizes, compiled="compiled" in extras)


def _channels_last(sample: Any) -> Callable[[int], Any]:
    """Return ``make_batch`` for images whose channels lie next to each other, which repeating rows would not keep."""
    grow = take_sample(sample).grow
    return lambda rows: map_tensors(grow(rows), lambda leaf: leaf.to(memory_format=torch.channels_last) if leaf.dim() == 4 else leaf)


ZOO: dict[str, Callable[[int], Recipe]] = {
    name: functools.partial(recipe, name) for name in ("-".join(line.split()) for line in _LINES.split("\n") if line)
}
