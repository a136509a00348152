"""Parts that several models of the zoo are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, kw_only=True)
class Parts:
    """One training step before its optimizer and its precision are chosen.

    Attributes:
        model: the module, in fp32 on the CPU.
        sample: a batch of two rows.
        loss: ``loss_fn`` or ``step``, as ``autobatch.find`` takes them.
        batch_sizes: rows to record at the scale of a card.
    """

    model: nn.Module
    sample: Any
    loss: dict[str, Callable[..., Tensor]]
    batch_sizes: tuple[int, ...]


class Stack(nn.Sequential):
    """Blocks one after the other, each computed again in the backward pass where ``checkpointed``."""

    def __init__(self, *blocks: nn.Module, checkpointed: bool = False) -> None:
        super().__init__(*blocks)
        self.checkpointed = checkpointed

    def forward(self, input: Tensor) -> Tensor:
        for block in self:
            input = checkpoint(block, input, use_reentrant=False) if self.checkpointed and torch.is_grad_enabled() else block(input)
        return input


class Attention(nn.Module):
    """Self-attention over ``(rows, length, width)``, the three projections in one product."""

    def __init__(self, width: int, heads: int, *, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        rows, length, width = x.shape
        query, key, value = self.qkv(x).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        kept = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=kept, is_causal=self.causal)
        joined: Tensor = self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return joined


class Block(nn.Module):
    """A transformer block with the norms in front: attention, then a perceptron four times as wide."""

    def __init__(self, width: int, heads: int, *, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal, dropout=dropout)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        mixed: Tensor = x + self.mlp(x)
        return mixed


def conv_norm(inside: int, outside: int, size: int = 3, *, stride: int = 1, groups: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    """Return a convolution without bias, batch norm and, where given, an activation."""
    layers = [nn.Conv2d(inside, outside, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(outside)]
    return nn.Sequential(*layers, *([act] if act is not None else []))


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of ``(rows, length, vocabulary)`` against ``(rows, length)``."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def tokens(vocabulary: int, length: int) -> Tensor:
    """Return two rows of token numbers, shape ``(2, length)``."""
    return torch.randint(vocabulary, (2, length))


def images(side: int) -> Tensor:
    """Return two square images with three channels, shape ``(2, 3, side, side)``."""
    return torch.randn(2, 3, side, side)


def labels() -> Tensor:
    """Return two class numbers below 10."""
    return torch.randint(10, (2,))
