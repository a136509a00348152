"""What the same step does on CUDA: a layer over torch's functions that makes fake CPU tensors behave as they would on a card.

Attention takes the kernel that PyTorch would choose there, dropout keeps a bool mask, and autocast follows CUDA's lists
(``ATen/autocast_mode.h``) rather than the CPU's: matrix products in the low dtype, weights cast once until autocast ends; norms,
softmax, losses and reductions in fp32. Temporaries inside operators, which no fake tensor shows, come from rules.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from autobatch.simulate.autocast_lists import FULL, LOW, WIDEST

_HALF = (torch.float16, torch.bfloat16)
# As they are before anything replaces them.
_ATTENTION, _DROPOUT = F.scaled_dot_product_attention, F.dropout
_FLASH_HEAD = 256  # the largest head size of the flash kernels


class CudaSemantics(TorchFunctionMode):
    """Active while forward and loss run.

    Args:
        precision: autocast dtype by name, ``None`` for none.
        capability: compute capability of the card, for example ``(8, 6)``.
        keep_casts: whether a weight is cast once until the end, or each time, as in a part that runs again in the backward pass.
    """

    def __init__(self, precision: str | None, capability: tuple[int, int], *, keep_casts: bool = True) -> None:
        super().__init__()
        self._low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision or "")
        self._capability, self._keep_casts = capability, keep_casts
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is _ATTENTION:
            return self._attention(*args, **kwargs)
        if func is _DROPOUT:
            return self._dropout(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self._inside_functional():
                return func(*args, **kwargs)
        if self._low is not None:
            if name in LOW:
                args, kwargs = tree_map(self._to_low, (args, kwargs))
            elif name in FULL:
                args, kwargs = tree_map(_to_full, (args, kwargs))
            elif name in WIDEST:
                args, kwargs = _to_widest(args, kwargs)
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def _inside_functional(self) -> Iterator[None]:
        """Catch what a function written in Python calls itself: inside a call this mode is off."""
        names = ("linear", "scaled_dot_product_attention", "dropout", "softmax")
        originals = {name: getattr(F, name) for name in names}
        try:
            for name, original in originals.items():
                setattr(F, name, functools.partial(self._call, original))
            yield
        finally:
            for name, original in originals.items():
                setattr(F, name, original)

    def _call(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__torch_function__(original, (), args, kwargs)

    def forget_casts(self) -> None:
        """Drop the weights' casts, as leaving autocast does."""
        self._casts.clear()

    def _to_low(self, value: Any) -> Any:
        """Return a floating-point tensor in the low dtype; the cast of a weight is made once."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype in (self._low, torch.float64):
            return value
        if not (self._keep_casts and value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(self._low)
        if id(value) not in self._casts:
            self._casts[id(value)] = value, value.to(self._low)
        return self._casts[id(value)][1]

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        result: Tensor = torch.ops.aten.native_dropout(input, p, True)[0]
        return input.copy_(result) if inplace else result

    def _attention(
        self,
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
        if self._low is not None:
            query, key, value = (self._to_low(tensor) for tensor in (query, key, value))
            attn_mask = self._to_low(attn_mask) if attn_mask is not None else None
        head = query.shape[-1]
        fused = query.dim() == 4 and head == value.shape[-1]
        if fused and attn_mask is None and query.dtype in _HALF and self._capability >= (8, 0) and head <= _FLASH_HEAD:
            padded = [_padded(tensor) for tensor in (query, key, value)]
            wanted = scale if scale is not None else 1 / math.sqrt(head)
            result = torch.ops.aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=wanted)[0]
            return result[..., :head]  # type: ignore[no-any-return]
        if enable_gqa and key.shape[1] != query.shape[1]:
            key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
        aligned = head % (8 if query.dtype in _HALF else 4) == 0
        if fused and aligned and self._capability >= (5, 0) and query.dtype in (*_HALF, torch.float32):
            keep = any(tensor.requires_grad for tensor in (query, key, value))
            bias = _bias(attn_mask, query, key)
            return torch.ops.aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
                query, key, value, bias, keep, dropout_p, is_causal, scale=scale
            )[0]
        return torch.ops.aten._scaled_dot_product_attention_math(  # type: ignore[no-any-return]
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale
        )[0]


@contextlib.contextmanager
def cuda_semantics(precision: str | None, capability: tuple[int, int], *, keep_casts: bool = True) -> Iterator[None]:
    """Run what is inside as it would run on a card of that compute capability."""
    semantics = CudaSemantics(precision, capability, keep_casts=keep_casts)
    with semantics:
        yield
    semantics.forget_casts()


def use_foreach(optimizer: torch.optim.Optimizer | None) -> None:
    """Step over all parameters at once where nothing else was asked for, as PyTorch does by default for parameters on CUDA."""
    for group in optimizer.param_groups if optimizer is not None else ():
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


def operator_temporaries(operator: str, arguments: tuple[Any, ...]) -> int:
    """Return the bytes that an operator takes and gives back inside itself on CUDA, as far as there is a rule for it.

    Flash attention's backward accumulates the query's gradient in fp32, sequences padded to 128 rows and heads to 32 numbers, beside one
    fp32 number for each row of each head (``flash_api.cpp``).
    """
    if operator == "aten._scaled_dot_product_flash_attention_backward":
        query = arguments[1]
        rows, heads, length, head = query.shape
        padded = -(-length // 128) * 128
        return int(4 * rows * heads * padded * (-(-head // 32) * 32 + 1))
    return 0


def _to_full(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value


def _to_widest(args: Any, kwargs: Any) -> Any:
    found: list[torch.dtype] = []

    def look(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            found.append(value.dtype)
        return value

    tree_map(look, (args, kwargs))
    if torch.float32 not in found or not any(dtype in _HALF for dtype in found):
        return args, kwargs
    return tree_map(_to_full, (args, kwargs))


def _padded(tensor: Tensor) -> Tensor:
    """Pad the head size to a multiple of 8, which the flash kernels want."""
    missing = -tensor.shape[-1] % 8
    return nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Return the mask as an additive one, its rows padded to 16 numbers and expanded to every head, as PyTorch hands it to the kernel."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    missing = -mask.shape[-1] % 16
    if missing:
        mask = nn.functional.pad(mask, (0, missing))[..., : mask.shape[-1]]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
