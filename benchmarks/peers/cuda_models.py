"""The models and budgets of the run on a card: real architectures with random weights, nothing downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.core.units import GIB
from benchmarks.peers.models import Model, Recurrent, UNet, adamw

BUDGETS = (8 * GIB, 24 * GIB, 64 * GIB)


class Logits(nn.Module):
    """A language model called with tokens alone."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of ``tokens``, of shape (rows, vocabulary, length)."""
        logits: Tensor = self.body(input_ids=tokens).logits
        return logits.transpose(1, 2)


def _vision(timm_name: str, torchvision_name: str) -> nn.Module:
    built: Any
    if importlib.util.find_spec("timm") is not None:
        built = importlib.import_module("timm").create_model(timm_name, pretrained=False)
    else:
        built = importlib.import_module("torchvision.models").get_model(torchvision_name, weights=None)
    module: nn.Module = built
    return module


def _language(kind: str, automatic: str) -> nn.Module:
    transformers: Any = importlib.import_module("transformers")
    return Logits(getattr(transformers, automatic).from_config(transformers.AutoConfig.for_model(kind)))


def _images() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 224, 224), torch.randint(1000, (2,))


def _tokens(vocabulary: int) -> tuple[Tensor, Tensor]:
    return torch.randint(vocabulary, (2, 512)), torch.randint(vocabulary, (2, 512))


_Shape = tuple[Callable[[], nn.Module], Callable[[], tuple[Any, Tensor]], Callable[[Any, Tensor], Tensor]]
_MODELS: dict[str, _Shape] = {
    "resnet50": (partial(_vision, "resnet50", "resnet50"), _images, nn.functional.cross_entropy),
    "vit_base": (partial(_vision, "vit_base_patch16_224", "vit_b_16"), _images, nn.functional.cross_entropy),
    "gpt2": (partial(_language, "gpt2", "AutoModelForCausalLM"), partial(_tokens, 50257), nn.functional.cross_entropy),
    "bert": (partial(_language, "bert", "AutoModelForMaskedLM"), partial(_tokens, 30522), nn.functional.cross_entropy),
    "unet": (partial(UNet, 64), lambda: (torch.randn(2, 1, 256, 256), torch.randn(2, 1, 256, 256)), nn.functional.mse_loss),
    "lstm": (partial(Recurrent, 256, 1024), lambda: (torch.randn(2, 256, 256), torch.randn(2, 1)), nn.functional.mse_loss),
}
CARD = tuple(
    Model(name=name, build=build, sample=sample, loss=loss, optimizer=adamw, limit=budget, device="cuda", precision="bf16")
    for name, (build, sample, loss) in _MODELS.items()
    for budget in BUDGETS
)
