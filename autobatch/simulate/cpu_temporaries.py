"""What convolutions take and give back inside themselves on the CPU: with it a trace can be held against the real CPU allocator.

oneDNN convolves channels in blocks of as many numbers as a vector register has. Tensors that lie otherwise are reordered into blocks,
their channels padded to whole ones; inputs of up to four channels and channels_last stay as they are (seen in the allocator's events of
torch 2.13 on AVX-512).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_FEW = 4


def cpu_temporaries(operator: str, arguments: tuple[Any, ...]) -> int:
    """Return the bytes that ``operator`` takes inside itself on the CPU at its highest, less what it returns."""
    if operator == "aten.convolution":
        return _forward(arguments)
    if operator == "aten.convolution_backward":
        return _backward(*arguments[:3])
    return 0


def _backward(gradient: Tensor, input: Tensor, weight: Tensor) -> int:
    """The weight's gradient is the higher half: gradient and input lie there in blocks, and every thread sums weights of its own."""
    if _stays(input):
        return 0
    sums = torch.get_num_threads() * _weights(weight)
    return _blocked(gradient) + _blocked(input, few=False) + sums - _bytes(weight)


def _forward(arguments: tuple[Any, ...]) -> int:
    """Input, weight and output lie there in blocks; then the output is put in order, after the first two have gone."""
    input, weight, _bias, stride, padding, dilation, transposed = arguments[:7]
    if _stays(input) or transposed:
        return 0
    sizes = [
        (size + 2 * padding[index] - dilation[index] * (weight.shape[2 + index] - 1) - 1) // stride[index] + 1
        for index, size in enumerate(input.shape[2:])
    ]
    spread = input.shape[0] * math.prod(sizes) * input.itemsize
    output, blocked = weight.shape[0] * spread, _padded(weight.shape[0]) * spread
    return int(max(_blocked(input) + _weights(weight) + blocked - output, blocked))


def _stays(input: Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    return last is None or (input.is_contiguous(memory_format=last) and not input.is_contiguous())


def _blocked(tensor: Tensor, *, few: bool = True) -> int:
    """Return the bytes of ``tensor`` in blocks; where ``few`` is told, none for a few channels, which are read as they lie."""
    channels = tensor.shape[1]
    if channels <= _FEW:
        return 0 if few else _bytes(tensor)
    return _bytes(tensor) // channels * _padded(channels)


def _weights(weight: Tensor) -> int:
    out, into = weight.shape[:2]
    return _bytes(weight) // (out * into) * _padded(out) * (into if into <= _FEW else _padded(into))


def _padded(channels: int) -> int:
    block = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    return -(-channels // block) * block


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize
