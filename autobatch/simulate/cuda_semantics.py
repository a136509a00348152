"""What the same step does on CUDA: a layer over torch's functions that makes fake CPU tensors behave as they would on a card.

Attention takes the kernel that PyTorch would choose there, dropout keeps a bool mask, recurrent layers run as cuDNN runs them, and autocast
follows CUDA's lists (``ATen/autocast_mode.h``) rather than the CPU's: matrix products in the low dtype, weights cast once until autocast
ends; norms, softmax, losses and reductions in fp32.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from autobatch.simulate.autocast_lists import FULL, FULL_RESULT, FUSED_RMS_NORM, LOW, WIDEST
from autobatch.simulate.cuda_attention import attention
from autobatch.simulate.cuda_operators import cross_entropy, dropout, rms_norm, softmax
from autobatch.simulate.cuda_patches import card_for_step, undispatched
from autobatch.simulate.cuda_rnn import RECURRENT, recurrent
from autobatch.simulate.cuda_temporaries import operator_temporaries

__all__ = ["CudaSemantics", "autocast", "on_cuda", "operator_temporaries", "use_foreach"]

_HALF = (torch.float16, torch.bfloat16)
_COMPOSED = ("torch.nn.functional", "torch.functional")


class CudaSemantics(TorchFunctionMode):
    """Active while a step runs, its backward pass included; what runs in which dtype follows from PyTorch's autocast state for CUDA.

    Args:
        capability: compute capability of the card, for example ``(8, 6)``.
    """

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}
        self._instead: dict[Any, Callable[..., Any]] = {
            F.scaled_dot_product_attention: functools.partial(attention, capability),
            torch.dropout: dropout,
            **{function: functools.partial(recurrent, function) for function in RECURRENT},
            **({torch.rms_norm: rms_norm} if FUSED_RMS_NORM else {}),
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        body = undispatched(func) if _is_composed(func) else func
        if body is not func:
            with self:
                return body(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cuda"):
            if name == "cross_entropy_loss":
                with self:
                    return cross_entropy(*args, **kwargs)
            args, kwargs = self._cast(name, args, kwargs)
        if name in ("softmax", "log_softmax"):
            return softmax(func, *args, **kwargs)
        return self._instead.get(func, func)(*args, **kwargs)

    def forget_casts(self) -> None:
        """Drop the weights' casts, as leaving autocast does."""
        self._casts.clear()

    def _cast(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments as autocast hands them to the function of that name."""
        if name in LOW or name == "scaled_dot_product_attention":
            return tree_map(self._to_low, (args, kwargs))  # type: ignore[no-any-return]
        if name in FULL:
            return tree_map(_to_full, (args, kwargs))  # type: ignore[no-any-return]
        if name in FULL_RESULT:
            return args, _with_full_result(name, args, kwargs)
        return _to_widest(args, kwargs) if name in WIDEST else (args, kwargs)

    def _to_low(self, value: Any) -> Any:
        """Return a floating-point tensor in the low dtype; the cast of a weight is made once."""
        low = torch.get_autocast_dtype("cuda")
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype in (low, torch.float64):
            return value
        weight = value.is_leaf and value.requires_grad and value.dtype == torch.float32 and not value._is_view()
        if not (weight and torch.is_autocast_cache_enabled()):
            return value.to(low)
        if id(value) not in self._casts or self._casts[id(value)][1].dtype != low:
            self._casts[id(value)] = value, value.to(low)
        return self._casts[id(value)][1]


_running: list[CudaSemantics] = []


@contextlib.contextmanager
def on_cuda(capability: tuple[int, int]) -> Iterator[None]:
    """Trace what is inside, forward and backward passes and optimizer, as it would run on a card of that compute capability."""
    if _running:
        yield
        return
    semantics = CudaSemantics(capability)
    _running.append(semantics)
    try:
        with card_for_step(semantics.forget_casts), semantics:
            yield
    finally:
        _running.clear()
        semantics.forget_casts()


def autocast(precision: str | None) -> contextlib.AbstractContextManager[Any]:
    """Return autocast for forward and loss, to be entered inside ``on_cuda``.

    Args:
        precision: ``"bf16"``, ``"fp16"``, ``"fp32"`` for none whatever is around, ``None`` for the model's own.

    Raises:
        RuntimeError: it is not inside; PyTorch would leave it disabled where there is no card.
    """
    if not _running:
        raise RuntimeError("autocast for CUDA is simulated inside on_cuda only")
    if precision is None:
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast("cuda", dtype=dtype, enabled=dtype is not None)


def use_foreach(optimizer: torch.optim.Optimizer | None) -> None:
    """Step over all parameters at once where nothing else was asked for, as PyTorch does by default for parameters on CUDA."""
    for group in optimizer.param_groups if optimizer is not None else ():
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


def _is_composed(function: Any) -> bool:
    """Whether PyTorch wrote it in Python, of functions that modes are asked for one by one."""
    return isinstance(function, types.FunctionType) and (function.__module__ in _COMPOSED or function is Tensor.norm)


def _to_full(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value


def _with_full_result(name: str, args: Any, kwargs: Any) -> Any:
    """Return the keywords with fp32 as the result's dtype, where a half-precision tensor comes in and no dtype was asked for."""
    first = args[0] if args else kwargs.get("input")
    asked = kwargs.get("dtype") is not None or (name in ("softmax", "log_softmax") and len(args) > 2)
    if asked or not isinstance(first, Tensor) or first.dtype not in _HALF:
        return kwargs
    return {**kwargs, "dtype": torch.float32}


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
