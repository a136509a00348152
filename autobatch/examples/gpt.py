"""A small GPT in plain torch, trained with AdamW: something heavy for memory to do, without a data set.

autobatch probe example:gpt
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS = 8192, 128, 192, 6, 6


class Block(nn.Module):
    """Attention to what came before, then two layers for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` of shape (rows, tokens, width), changed."""
        rows, tokens, _ = x.shape
        heads = self.qkv(self.before_attention(x)).view(rows, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind()
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(rows, tokens, WIDTH))
        changed: Tensor = x + self.mlp(self.before_mlp(x))
        return changed


class GPT(nn.Module):
    """Predicts the next token; the output layer shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of shape (rows, tokens, vocabulary) for ``tokens`` of shape (rows, tokens)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of every next token."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Return the optimizer; its learning rate is meant for batches of 64 rows."""
    return torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.1)


def build() -> dict[str, Any]:
    """Return ``find``'s arguments: the model, a row of random tokens with its targets, the loss and the optimizer."""
    rows = torch.randint(VOCABULARY, (1, CONTEXT + 1))
    return {
        "model": GPT(),
        "sample": (rows[:, :-1], rows[:, 1:]),
        "loss_fn": loss_fn,
        "optimizer": adamw,
        "base_batch_size": 64,
        "lr_rule": "sqrt",
    }
