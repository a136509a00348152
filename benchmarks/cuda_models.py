"""The models that the checks on a card run: real architectures with random weights, nothing downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn


class Vision(nn.Module):
    """An image model and its loss in one, so that every model is called alike."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.body(images), labels)}


def _vision(timm_name: str, torchvision_name: str) -> tuple[nn.Module, dict[str, Any]]:
    if importlib.util.find_spec("timm") is not None:
        import timm

        body = timm.create_model(timm_name, pretrained=False)
    elif importlib.util.find_spec("torchvision") is not None:
        from torchvision import models

        body = models.get_model(torchvision_name, weights=None)
    else:
        pytest.skip("neither timm nor torchvision is installed: pip install timm")
    return Vision(body), {"images": torch.randn(2, 3, 224, 224), "labels": torch.randint(1000, (2,))}


def _language(kind: str, length: int) -> tuple[nn.Module, dict[str, Any]]:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed: pip install transformers")
    import transformers

    config = transformers.AutoConfig.for_model(kind)
    automatic = transformers.AutoModelForCausalLM if kind == "gpt2" else transformers.AutoModelForMaskedLM
    tokens = torch.randint(config.vocab_size, (2, length))
    return automatic.from_config(config), {"input_ids": tokens, "labels": tokens}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "resnet50": lambda: _vision("resnet50", "resnet50"),
    "vit_base": lambda: _vision("vit_base_patch16_224", "vit_b_16"),
    "gpt2": lambda: _language("gpt2", 512),
    "bert_base": lambda: _language("bert", 512),
}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {"sgd": sgd, "adamw": adamw}
