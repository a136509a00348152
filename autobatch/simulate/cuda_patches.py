"""Parts of PyTorch that ask for a card, told that there is one, while a step is traced on fake CPU tensors.

Autocast's state for CUDA exists in builds without CUDA too and changes nothing for CPU tensors. So the state itself is PyTorch's own:
nesting, ``enabled=False``, decorators, ``torch.is_autocast_enabled`` and what activation checkpointing brings back for the backward pass
follow from it. Only the test for a card is answered otherwise.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.amp import GradScaler, autocast_mode


def undispatched(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that PyTorch wrote in Python without its own dispatch to modes, so that what it calls still meets them.

    One that leaves the dispatch to a function it calls is returned as it is.
    """
    if not isinstance(function, types.FunctionType):
        return function
    tests = {name: _no for name in function.__code__.co_names if name.startswith("has_torch_function")}
    if not tests:
        return function
    copy = types.FunctionType(
        function.__code__, {**function.__globals__, **tests}, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@contextlib.contextmanager
def card_for_autocast() -> Iterator[None]:
    """Let autocast for CUDA and ``GradScaler`` be enabled although there is no card."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", _no))
        stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", _yes))
        yield


@contextlib.contextmanager
def card_for_step(forget_casts: Callable[[], None]) -> Iterator[None]:
    """Let the step run as on a card: autocast, gradient scaling, and modes that stay on in the backward pass.

    Args:
        forget_casts: called where PyTorch drops the casts that autocast has cached.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(card_for_autocast())
        clear = torch.clear_autocast_cache

        def clear_all() -> None:
            clear()
            forget_casts()

        stack.enter_context(mock.patch.object(torch, "clear_autocast_cache", clear_all))
        stack.enter_context(_one_device())
        stack.enter_context(_scaling())
        # Dispatched to a mode, they would run the whole backward pass, checkpointed parts of the model included, without it.
        stack.enter_context(mock.patch.object(torch.autograd, "backward", undispatched(torch.autograd.backward)))
        stack.enter_context(mock.patch.object(torch.autograd, "grad", undispatched(torch.autograd.grad)))
        stack.enter_context(mock.patch.object(Tensor, "backward", undispatched(Tensor.backward)))
        yield


@contextlib.contextmanager
def _one_device() -> Iterator[None]:
    """Let autocast for the CPU mean CUDA's: code that takes the device's name from a fake tensor says CPU where it means the card."""
    begin, enabled, dtype = autocast_mode.autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype

    def init(self: Any, device_type: str, *arguments: Any, **keywords: Any) -> None:
        begin(self, _card(device_type), *arguments, **keywords)

    def is_enabled(device_type: str = "cuda") -> bool:
        return enabled(_card(device_type))

    def get_dtype(device_type: str) -> torch.dtype:
        return dtype(_card(device_type))

    with (
        mock.patch.object(autocast_mode.autocast, "__init__", init),
        mock.patch.object(torch, "is_autocast_enabled", is_enabled),
        mock.patch.object(torch, "get_autocast_dtype", get_dtype),
    ):
        yield


@contextlib.contextmanager
def _scaling() -> Iterator[None]:
    """Let ``GradScaler`` work on tensors without values: no gradient is infinite, the scale stays what it was at first."""
    begin, used = GradScaler._lazy_init_scale_growth_tracker, []

    def init(self: Any, device: torch.device) -> None:
        begin(self, device)
        used.append(self)

    def step(_self: Any, optimizer: Any, _state: Any, *arguments: Any, **keywords: Any) -> Any:
        return optimizer.step(*arguments, **keywords)

    with mock.patch.multiple(
        GradScaler,
        _lazy_init_scale_growth_tracker=init,
        _maybe_opt_step=step,
        get_scale=lambda self: self._init_scale if self._enabled else 1.0,
        _get_growth_tracker=lambda self: self._init_growth_tracker if self._enabled else 0,
    ):
        try:
            yield
        finally:
            # Their scale is a fake tensor of this trace, which the next one could not read.
            for scaler in used:
                scaler._scale = scaler._growth_tracker = None
                scaler._per_optimizer_states.clear()


def _card(device_type: str) -> str:
    return "cuda" if device_type == "cpu" else device_type


def _no(*_arguments: Any, **_keywords: Any) -> bool:
    return False


def _yes(*_arguments: Any, **_keywords: Any) -> bool:
    return True
