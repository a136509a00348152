"""LSTM, GRU and plain recurrent layers as cuDNN runs them, on fake CPU tensors: one operator for all time steps, layers and directions.

``_cudnn_rnn`` itself can be called with fake CPU tensors, but its reserve is empty there and its backward pass has no kernel; so the
storages that ``ATen/native/cudnn/RNN.cpp`` makes are made here. Where tensors have values, results are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# By the function that the layer calls: numbers that each time step, layer and direction keeps for the backward pass, as multiples of the
# hidden size.
RECURRENT: dict[Any, int] = {torch.lstm: 5, torch.gru: 4, torch.rnn_tanh: 1, torch.rnn_relu: 1}


@dataclass(frozen=True, slots=True)
class Layers:
    """Recurrent layers, as far as their memory goes.

    Attributes:
        kept: numbers kept for each time step, layer and direction, as multiples of the hidden size.
        hidden: hidden size.
        output: size of one direction's output: the projection's, or the hidden size.
        layers: how many.
        directions: 1 or 2.
        batch_first: whether rows come before time steps.
        dropout: probability between layers.
        train: whether a backward pass is prepared.
    """

    kept: int
    hidden: int
    output: int
    layers: int
    directions: int
    batch_first: bool
    dropout: float
    train: bool

    def reserve(self, tokens: int, itemsize: int) -> int:
        """Return the bytes that cuDNN keeps from the forward to the backward pass.

        Derived: the gradients of the weights are computed from this buffer after all time steps, so it has room for every gate of every
        time step (LSTM 4, GRU 3, plain 1); an LSTM's cell states and a GRU's product of hidden state and weights, to which the reset gate
        is applied, cannot be had back from the gates; outputs of inner layers are inputs of the next ones' gradients, once more behind
        dropout. Assumed, since cuDNN publishes no sizes: that there is nothing else, and that all of it is in the input's dtype.
        """
        between = (self.layers - 1) * self.directions * self.output * (2 if self.dropout > 0 else 1)
        return tokens * itemsize * (self.layers * self.directions * self.kept * self.hidden + between)

    def workspace(self, tokens: int, itemsize: int) -> int:
        """Return the bytes of scratch memory of a forward pass.

        Derived: the products of inputs and weights are computed for all time steps at once, before the steps. Training keeps them in the
        reserve; without one they need room for one layer. Assumed: nothing beside.
        """
        return 0 if self.train else tokens * itemsize * self.directions * self.kept * self.hidden


class _CudnnRnn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: Layers, low: bool, input: Tensor, hx: Tensor, cx: Tensor | None, *weights: Tensor) -> Any:
        # On the card the weights are views of one buffer already; autocast makes another one, in fp16 whatever its dtype.
        flat = torch.zeros(sum(w.numel() for w in weights), dtype=input.dtype, device=input.device) if low else None
        inner = _by_time(input, layers)
        tokens = inner.numel() // max(1, inner.shape[-1])
        output = inner.new_zeros([*inner.shape[:-1], layers.directions * layers.output])
        hy, cy = torch.zeros_like(hx), torch.zeros_like(cx) if cx is not None else None
        _scratch(layers.workspace(tokens, inner.itemsize), input)
        reserve = _scratch(layers.reserve(tokens, inner.itemsize) if layers.train else 0, input)
        if layers.batch_first:
            output = output.transpose(0, 1)
        ctx.layers, ctx.low = layers, low
        ctx.save_for_backward(input, hx, cx, output, reserve, flat, *weights)
        return (output, hy) if cy is None else (output, hy, cy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        input, hx, cx, _output, _reserve, _flat, *weights = ctx.saved_tensors
        inner, _of_output = _by_time(input, ctx.layers), _by_time(gradients[0], ctx.layers)
        of_input = torch.zeros_like(inner, memory_format=torch.contiguous_format)
        of_hx, of_cx = torch.zeros_like(hx), torch.zeros_like(cx) if cx is not None else None
        flat = torch.zeros(sum(w.numel() for w in weights), dtype=input.dtype, device=input.device)
        pieces = torch.split(flat, [w.numel() for w in weights])
        of_weights = [piece.view(w.shape).to(w.dtype) for piece, w in zip(pieces, weights, strict=True)]
        if ctx.layers.batch_first:
            of_input = of_input.transpose(0, 1)
        return (None, None, of_input if ctx.needs_input_grad[2] else None, of_hx, of_cx, *of_weights)


def recurrent(function: Any, *args: Any) -> Any:
    """Run ``torch.lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu`` in cuDNN's way; packed sequences too, whose rows are their time steps."""
    is_lstm = function is torch.lstm
    packed = isinstance(args[1 if is_lstm else 2], Tensor)
    if packed:
        input, _sizes, state, weights, _biases, count, dropout, train, bidirectional = args
    else:
        input, state, weights, _biases, count, dropout, train, bidirectional, batch_first = args
    hx, cx = (state[0], state[1]) if is_lstm else (state, None)
    low = torch.is_autocast_enabled("cuda")
    if low:
        input, hx, cx = (tensor.half() if tensor is not None else None for tensor in (input, hx, cx))
    layers = Layers(
        kept=RECURRENT[function],
        hidden=cx.shape[-1] if cx is not None else hx.shape[-1],
        output=hx.shape[-1],
        layers=count,
        directions=2 if bidirectional else 1,
        batch_first=not packed and batch_first,
        dropout=dropout,
        train=train,
    )
    cast = low and any(weight.dtype != torch.float16 for weight in weights)
    return _CudnnRnn.apply(layers, cast, input, hx, cx, *weights)  # type: ignore[no-untyped-call]


def _by_time(tensor: Tensor, layers: Layers) -> Tensor:
    """Return the tensor with time steps first, as cuDNN wants it, copied where it lies otherwise."""
    return (tensor.transpose(0, 1) if layers.batch_first else tensor).contiguous()


def _scratch(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)
