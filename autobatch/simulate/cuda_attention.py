"""Scaled dot-product attention by the kernel that PyTorch would choose on CUDA, on fake CPU tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_HALF = (torch.float16, torch.bfloat16)
_FLASH_HEAD = 256  # the largest head size of the flash kernels


def attention(
    capability: tuple[int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Run the kernel that PyTorch chooses: flash for half precision without a mask, else memory-efficient, else the plain formula."""
    head = query.shape[-1]
    fused = query.dim() == 4 and head == value.shape[-1]
    if fused and attn_mask is None and query.dtype in _HALF and capability >= (8, 0) and head <= _FLASH_HEAD:
        padded = [_padded(tensor) for tensor in (query, key, value)]
        wanted = scale if scale is not None else 1 / math.sqrt(head)
        result = torch.ops.aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=wanted)[0]
        return result[..., :head]  # type: ignore[no-any-return]
    if enable_gqa and key.shape[1] != query.shape[1]:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    aligned = head % (8 if query.dtype in _HALF else 4) == 0
    if fused and aligned and capability >= (5, 0) and query.dtype in (*_HALF, torch.float32):
        keep = any(tensor.requires_grad for tensor in (query, key, value))
        bias = _bias(attn_mask, query, key)
        return torch.ops.aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
            query, key, value, bias, keep, dropout_p, is_causal, scale=scale
        )[0]
    return torch.ops.aten._scaled_dot_product_attention_math(  # type: ignore[no-any-return]
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale
    )[0]


def _padded(tensor: Tensor) -> Tensor:
    """Pad the head size to a multiple of 8, which the flash kernels want."""
    missing = -tensor.shape[-1] % 8
    return F.pad(tensor, (0, missing)) if missing else tensor


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Return the mask as an additive one, its rows padded to 16 numbers and expanded to every head, as PyTorch hands it to the kernel."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    missing = -mask.shape[-1] % 16
    if missing:
        mask = F.pad(mask, (0, missing))[..., : mask.shape[-1]]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
