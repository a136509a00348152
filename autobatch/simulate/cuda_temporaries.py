"""Bytes that operators take and give back inside themselves on CUDA, which no fake tensor shows: by rule, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_INDEX = 8  # bytes of an index


def operator_temporaries(operator: str, arguments: tuple[Any, ...]) -> int:
    """Return the bytes that an operator takes and gives back inside itself on CUDA, as far as there is a rule for it.

    No rule is needed for fused optimizers, the backward passes of softmax and of losses, and dropout: they work in registers. None is known
    for attention by cuDNN and for the partial sums of norms' backward passes, which do not grow with the batch.
    """
    rule = _RULES.get(operator)
    return rule(arguments) if rule is not None else 0


def _flash_backward(arguments: tuple[Any, ...]) -> int:
    """Accumulate the query's gradient in fp32, sequences padded to 128 rows and heads to 32 numbers, beside one fp32 number for each row.

    Source: ``mha_bwd`` in ``flash_api.cpp``.
    """
    rows, heads, length, head = arguments[1].shape
    return int(4 * rows * heads * _up(length, 128) * (_up(head, 32) + 1))


def _efficient_backward(arguments: tuple[Any, ...]) -> int:
    """Hold one fp32 number a row, and for half precision the query's gradient in fp32; for fp32 a product as large as the output.

    Source: ``attention_backward.cu`` and ``kernel_backward.h``: gradients are accumulated in a workspace where the output's dtype is not
    the accumulator's; fp32 kernels do not compute that one number themselves, so that PyTorch multiplies output and gradient and sums.
    Assumed: blocks of 64 rows and 64 numbers of a head.
    """
    query = arguments[1]
    rows, heads, length, head = query.shape
    if query.dtype in _HALF:
        return int(4 * rows * heads * (_up(length, 64) * _up(head, 64) + length))
    return int(4 * rows * heads * length * (head + 1))


def _embedding_backward(arguments: tuple[Any, ...]) -> int:
    """Sort the indices with their places, then sum rows in parts of ten in fp32; counted as for a batch that uses every row of the table.

    Source: ``Embedding.cu`` and ``EmbeddingBackwardKernel.cu``: keys and values, both sorted and unsorted, cub's second pair of buffers,
    and sums for every index that occurs and every ten places.
    """
    gradient, indices, rows = arguments[0], arguments[1], int(arguments[2])
    count, width = indices.numel(), gradient.shape[-1]
    parts = count / 10 + rows
    return int(_sort(count) + _INDEX * (3 * rows + parts) + 4 * parts * _up(width, 32))


def _index_put(arguments: tuple[Any, ...]) -> int:
    """Sort the places that are added to, so that equal ones are summed in order.

    Source: ``index_put_with_sort_kernel`` in ``Indexing.cu``, which is taken where values are accumulated.
    """
    accumulate = len(arguments) > 3 and bool(arguments[3])
    indices = [index for index in arguments[1] if isinstance(index, Tensor)]
    if not accumulate or not indices:
        return 0
    return _sort(math.prod(max(sizes) for sizes in zip_longest(*(index.shape[::-1] for index in indices), fillvalue=1)))


def _sorted(arguments: tuple[Any, ...]) -> int:
    """Sort numbers with their places by radix: both go back and forth between two buffers, and every number knows its row.

    Reason: ``segmented_sort_pairs`` in ``Sort.cu`` carries the row and the place of each number as one index. Assumed: two such indices
    (in and out), and a second buffer of numbers and of indices for cub's passes.
    """
    numbers = arguments[0]
    return int(numbers.numel() * (numbers.itemsize + 3 * _INDEX))


def _sort(count: int) -> int:
    """Return the bytes of a radix sort of pairs by cub: keys and values, both in and out, and one more pair of buffers for its passes.

    The keys' input is the operator's own argument where it is an index already; a linear index that was computed takes its place otherwise.
    """
    return 5 * _INDEX * count


def _convolution(arguments: tuple[Any, ...]) -> int:
    """Transpose what comes in and goes out to channels last, for half precision that lies otherwise.

    Reason: tensor cores take half precision with channels last; cuDNN transposes other layouts inside its workspace. Assumed: that its
    heuristics choose such a kernel, for which there is no documented size, and that grouped convolutions run without.
    """
    input, weight, _bias, stride, padding, dilation, transposed, output_padding, groups = arguments[:9]
    if groups != 1 or not _to_be_transposed(input):
        return 0
    sizes = [input.shape[0], weight.shape[1 if transposed else 0]]
    for index, size in enumerate(input.shape[2:]):
        reach = dilation[index] * (weight.shape[2 + index] - 1)
        if transposed:
            sizes.append((size - 1) * stride[index] - 2 * padding[index] + reach + output_padding[index] + 1)
        else:
            sizes.append((size + 2 * padding[index] - reach - 1) // stride[index] + 1)
    return int(input.itemsize * (input.numel() + weight.numel() + math.prod(sizes)))


def _convolution_backward(arguments: tuple[Any, ...]) -> int:
    """As forward, for the gradients of input and weight one after the other: each reads or writes all three."""
    gradient, input, weight = arguments[:3]
    if arguments[9] != 1 or not _to_be_transposed(input):
        return 0
    return int(input.itemsize * (gradient.numel() + input.numel() + weight.numel()))


def _to_be_transposed(input: Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    return last is not None and input.dtype in _HALF and not input.is_contiguous(memory_format=last)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


_RULES: dict[str, Callable[[tuple[Any, ...]], int]] = {
    "aten._scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten._scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "aten.embedding_dense_backward": _embedding_backward,
    "aten.sort": _sorted,
    "aten.index_put": _index_put,
    "aten.index_put_": _index_put,
    "aten._index_put_impl_": _index_put,
    "aten.convolution": _convolution,
    "aten.convolution_backward": _convolution_backward,
}
