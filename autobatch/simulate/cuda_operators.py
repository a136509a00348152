"""Operators that CUDA runs otherwise than the CPU, on fake CPU tensors: the same storages as there, made and kept at the same moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def dropout(input: Tensor, p: float, train: bool) -> Tensor:
    """Keep a bool mask; the CPU keeps one in the input's dtype."""
    if not train or p in (0, 1):
        return torch.dropout(input, p, train)
    return torch.ops.aten.native_dropout(input, p, True)[0]  # type: ignore[no-any-return]


def softmax(function: Any, input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **keywords: Any) -> Tensor:
    """Run softmax or its logarithm; from fp16 to fp32 CUDA has a kernel that needs no copy of the input, from bf16 it has none."""
    at_once = input.dtype == torch.float16 and dtype == torch.float32 and isinstance(input, FakeTensor)
    if at_once and dim is not None and not keywords:
        kernel = torch.ops.aten._log_softmax if function.__name__ == "log_softmax" else torch.ops.aten._softmax
        return kernel(input, dim, True)  # type: ignore[no-any-return]
    return function(input, dim, dtype=dtype, **keywords)  # type: ignore[no-any-return]


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Take ``cross_entropy_loss`` apart, as autocast does, which sees its parts only (``LossNLL.cpp``).

    The log-softmax names its input's dtype and so stays in half precision; the loss on it runs in fp32, on a copy that is kept beside it.
    """
    dim = 0 if input.dim() == 1 else 1
    logarithms = torch.log_softmax(input, dim, dtype=input.dtype)
    classes = input.shape[dim]
    if target.is_floating_point():
        if label_smoothing > 0:
            target = target * (1 - label_smoothing) + label_smoothing / classes
        products = logarithms * target if weight is None else logarithms * target * _along(weight, dim, input.dim())
        return _reduced(-products.sum(dim), reduction)
    loss: Tensor = torch._C._nn.nll_loss_nd(logarithms, target, weight, reduction, ignore_index)  # type: ignore[arg-type]
    if label_smoothing <= 0:
        return loss
    smooth = -(logarithms if weight is None else logarithms * _along(weight, dim, input.dim())).sum(dim)
    smooth = _reduced(smooth.masked_fill(target == ignore_index, 0.0), reduction)
    return (1 - label_smoothing) * loss + smooth * (label_smoothing / classes)


def _along(weight: Tensor, dim: int, dims: int) -> Tensor:
    return weight.view([-1 if index == dim else 1 for index in range(dims)])


def _reduced(losses: Tensor, reduction: int) -> Tensor:
    return losses if reduction == 0 else losses.mean() if reduction == 1 else losses.sum()


class _RmsNorm(torch.autograd.Function):
    """The fused kernel: input, weight and one number a row are kept; elsewhere PyTorch composes it and keeps the normalised input too."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, rows: int) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        deviation = torch.empty(rows, dtype=wide, device=input.device)
        ctx.save_for_backward(input, weight, deviation)
        return torch.empty_like(input, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        input, weight, _ = ctx.saved_tensors
        gradients[0].contiguous()
        of_weight = torch.empty_like(weight) if weight is not None and ctx.needs_input_grad[1] else None
        return torch.empty_like(input), of_weight, None


def rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Run ``rms_norm`` by the kernel that CUDA has for it; tensors with values keep to the CPU's way, which computes them."""
    if not isinstance(input, FakeTensor):
        return torch.rms_norm(input, normalized_shape, weight, eps)
    rows = input.numel() // max(1, math.prod(normalized_shape))
    return _RmsNorm.apply(input.contiguous(), weight, rows)  # type: ignore[no-any-return, no-untyped-call]
