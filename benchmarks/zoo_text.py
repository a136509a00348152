"""The zoo's models for tokens, graphs and plain vectors; ``scale`` multiplies widths and lengths as in ``zoo_vision``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo_blocks import Attention, Block, Parts, Stack, token_loss, tokens

_HEADS = 4
_VOCABULARY = 2000


class Gpt(nn.Module):
    """Decoder blocks; the output layer shares the embedding's weight."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, checkpointed: bool) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = Stack(*(Block(width, _HEADS, causal=True, dropout=0.1) for _ in range(depth)), checkpointed=checkpointed)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def gpt(scale: int, checkpointed: bool = False) -> Parts:
    """A causal language model after GPT-2."""
    length, vocabulary = 64 * scale, _VOCABULARY * scale
    model = Gpt(vocabulary, length, 64 * scale, 2 * scale, checkpointed)
    sample = tokens(vocabulary, length), tokens(vocabulary, length)
    return Parts(model=model, sample=sample, loss={"loss_fn": token_loss}, batch_sizes=(3, 12, 32))


class BertBlock(nn.Module):
    """A transformer block with the norms behind, and a mask over padded places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width, _HEADS, dropout=0.1)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))
        self.norm, self.other_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x, mask))
        normed: Tensor = self.other_norm(x + self.mlp(x))
        return normed


class Bert(nn.Module):
    """Encoder blocks and a head that tells every token."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(vocabulary, width, padding_idx=0), nn.Embedding(length, width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(0.1)
        self.blocks = nn.ModuleList(BertBlock(width) for _ in range(depth))
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.norm(self.embedding(ids) + self.places.weight[: ids.shape[1]]))
        mask = (ids != 0)[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        logits: Tensor = self.head(x)
        return logits


def bert(scale: int) -> Parts:
    """A masked language model."""
    length, vocabulary = 64 * scale, _VOCABULARY * scale
    model = Bert(vocabulary, length, 64 * scale, 2 * scale)
    sample = tokens(vocabulary - 1, length) + 1, tokens(vocabulary, length)
    return Parts(model=model, sample=sample, loss={"loss_fn": token_loss}, batch_sizes=(3, 12, 32))


class T5Attention(nn.Module):
    """Attention without scale, from ``x`` to ``memory``, with a bias added to the weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None) -> Tensor:
        query, key, value = (
            layer(part).unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            for layer, part in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        weights = query @ key.transpose(-1, -2)
        if bias is not None:
            weights = weights + bias
        weights = F.dropout(F.softmax(weights.float(), -1).to(weights.dtype), 0.1, self.training)
        joined: Tensor = self.out((weights @ value).transpose(1, 2).flatten(2))
        return joined


class T5Block(nn.Module):
    """Self-attention, attention to the encoder in a decoder, and a perceptron."""

    def __init__(self, width: int, decoder: bool) -> None:
        super().__init__()
        self.attention = T5Attention(width)
        self.across = T5Attention(width) if decoder else None
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.ReLU(), nn.Linear(4 * width, width, bias=False))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor | None, bias: Tensor) -> Tensor:
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed, bias)
        if self.across is not None and memory is not None:
            x = x + self.across(self.norms[1](x), memory, None)
        mixed: Tensor = x + self.mlp(self.norms[2](x))
        return mixed


class T5(nn.Module):
    """Encoder and decoder with learned biases by relative place."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.encoder = nn.ModuleList(T5Block(width, False) for _ in range(depth))
        self.decoder = nn.ModuleList(T5Block(width, True) for _ in range(depth))
        self.bias, self.other_bias = nn.Embedding(2 * length, _HEADS), nn.Embedding(2 * length, _HEADS)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def _bias(self, table: nn.Embedding, length: int, device: torch.device) -> Tensor:
        places = torch.arange(length, device=device)
        bias: Tensor = table(places[:, None] - places[None, :] + length)
        return bias.permute(2, 0, 1)[None]

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, x = self.embedding(source), self.embedding(target)
        bias = self._bias(self.bias, source.shape[1], source.device)
        for block in self.encoder:
            memory = block(memory, None, bias)
        length = target.shape[1]
        ahead = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        bias = self._bias(self.other_bias, length, target.device).masked_fill(ahead, float("-inf"))
        for block in self.decoder:
            x = block(x, memory, bias)
        logits: Tensor = self.head(x)
        return logits


def t5(scale: int) -> Parts:
    """A translation model; attention is written out, so its weights are stored."""
    length, vocabulary = 48 * scale, _VOCABULARY * scale
    sample = (tokens(vocabulary, length), tokens(vocabulary, length // 2)), tokens(vocabulary, length // 2)
    model = T5(vocabulary, length, 64 * scale, scale)
    return Parts(model=model, sample=sample, loss={"loss_fn": token_loss}, batch_sizes=(3, 12, 32))


class RootMeanSquare(nn.Module):
    """RMSNorm as language models write it: computed in fp32, given back in the input's dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotate(x: Tensor) -> Tensor:
    """Return ``(rows, heads, length, head)`` turned by an angle that grows with the place."""
    length, head = x.shape[-2:]
    speeds = 10000 ** (-torch.arange(0, head, 2, device=x.device).float() / head)
    angles = (torch.arange(length, device=x.device).float()[:, None] * speeds).repeat(1, 2)
    first, second = x.chunk(2, -1)
    return x * angles.cos().to(x.dtype) + torch.cat([-second, first], -1) * angles.sin().to(x.dtype)


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary places, then a gated perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.other_norm = RootMeanSquare(width), RootMeanSquare(width)
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key, self.value = nn.Linear(width, width // 2, bias=False), nn.Linear(width, width // 2, bias=False)
        self.gate, self.wide = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.narrow = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        head = x.shape[-1] // _HEADS
        query, key, value = (layer(normed).unflatten(-1, (-1, head)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        normed = self.other_norm(x)
        gated: Tensor = x + self.narrow(F.silu(self.gate(normed)) * self.wide(normed))
        return gated


def llama(scale: int, checkpointed: bool = False) -> Parts:
    """A causal language model after Llama."""
    length, vocabulary, width = 64 * scale, _VOCABULARY * scale, 64 * scale
    blocks = Stack(*(LlamaBlock(width) for _ in range(2 * scale)), checkpointed=checkpointed)
    model = nn.Sequential(nn.Embedding(vocabulary, width), blocks, RootMeanSquare(width), nn.Linear(width, vocabulary, bias=False))
    sample = tokens(vocabulary, length), tokens(vocabulary, length)
    return Parts(model=model, sample=sample, loss={"loss_fn": token_loss}, batch_sizes=(3, 12, 32))


class Recurrent(nn.Module):
    """An embedding, two recurrent layers, a head that tells every token."""

    def __init__(self, kind: type[nn.RNNBase], vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = kind(width, width, num_layers=2, dropout=0.1, batch_first=True)  # type: ignore[call-arg]
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.embedding(ids))[0])
        return logits


def _recurrent(kind: type[nn.RNNBase], scale: int) -> Parts:
    vocabulary, length = 500 * scale, 32 * scale
    sample = tokens(vocabulary, length), tokens(vocabulary, length)
    model = Recurrent(kind, vocabulary, 64 * scale)
    return Parts(model=model, sample=sample, loss={"loss_fn": token_loss}, batch_sizes=(15, 64, 200))


def lstm(scale: int) -> Parts:
    """A language model of LSTM layers."""
    return _recurrent(nn.LSTM, scale)


def gru(scale: int) -> Parts:
    """A language model of GRU layers."""
    return _recurrent(nn.GRU, scale)


class GraphLayer(nn.Module):
    """Messages along the edges, added up where they arrive."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU())
        self.update = nn.GRUCell(width, width)

    def forward(self, nodes: Tensor, source: Tensor, target: Tensor) -> Tensor:
        messages = self.message(torch.cat([nodes[source], nodes[target]], -1))
        arrived = torch.zeros_like(nodes).index_add(0, target, messages.to(nodes.dtype))
        updated: Tensor = self.update(arrived, nodes)
        return updated


class GraphNet(nn.Module):
    """Layers of messages over a batch of graphs, ``(rows, nodes, 8)`` and edges ``(rows, edges, 2)``, then one number a graph."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, width), nn.Linear(width, 1)
        self.layers = nn.ModuleList(GraphLayer(width) for _ in range(depth))

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        rows, count = nodes.shape[:2]
        first = torch.arange(rows, device=nodes.device)[:, None] * count
        source, target = ((edges[..., end] + first).flatten() for end in (0, 1))
        hidden = self.enter(nodes.flatten(0, 1))
        for layer in self.layers:
            hidden = layer(hidden, source, target)
        answer: Tensor = self.head(hidden.view(rows, count, -1).mean(1))[:, 0]
        return answer


def graph(scale: int) -> Parts:
    """A graph network with message passing."""
    count = 32 * scale
    sample = (torch.randn(2, count, 8), torch.randint(count, (2, 4 * count, 2))), torch.randn(2)
    return Parts(model=GraphNet(32 * scale, 3), sample=sample, loss={"loss_fn": F.mse_loss}, batch_sizes=(15, 64, 200))


def mlp(scale: int, checkpointed: bool = False) -> Parts:
    """A perceptron with norms and dropout."""
    width = 128 * scale
    blocks = [nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(0.2)) for _ in range(2 * scale)]
    model = nn.Sequential(nn.Linear(64, width), Stack(*blocks, checkpointed=checkpointed), nn.Linear(width, 10))
    sample = torch.randn(2, 64), torch.randint(10, (2,))
    return Parts(model=model, sample=sample, loss={"loss_fn": F.cross_entropy}, batch_sizes=(1001, 4096, 16384))
