"""A training step read in without its memory: large tensors are fake from the start, whatever asks for CUDA gets the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autobatch.core.errors import InvalidRequest
from autobatch.simulate.cuda_patches import card_for_autocast
from autobatch.workload.target import load_target
from autobatch.workload.workload import Workload

# Tensors up to this many numbers are really made: code that builds a model computes with such (``torch.linspace(…).tolist()``).
_SMALL = 4096


class OnCpu(TorchFunctionMode):
    """Gives the CPU to whatever asks for CUDA by name: ``.cuda()``, ``.to("cuda")``, ``device="cuda"``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if kwargs or any(isinstance(value, (str, torch.device)) for value in args):
            return func(*map(_elsewhere, args), **{name: _elsewhere(value) for name, value in (kwargs or {}).items()})
        return func(*args)


def _elsewhere(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")) else value


class _WithoutMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes large tensors fake and small ones really."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            with self._mode:
                made = func(*args, **kwargs)
            if any(isinstance(leaf, Tensor) and leaf.numel() > _SMALL for leaf in tree_leaves(made)):
                return made
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """Run what is inside as if the CPU were the card it asks for by name."""
    nothing = mock.patch.multiple(torch.cuda, synchronize=_nothing, empty_cache=_nothing, reset_peak_memory_stats=_nothing)
    with card_for_autocast(), OnCpu(), nothing:
        yield


def _nothing(*_arguments: Any, **_keywords: Any) -> None:
    """Do nothing."""


@contextlib.contextmanager
def without_memory() -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Make large tensors fake; gives what became of parameters that were converted, by the identity of the old one."""
    became: dict[int, tuple[Tensor, Tensor]] = {}

    def apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            child._apply(convert)  # type: ignore[no-untyped-call]
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = _converted(tensor, convert, became)
        return module

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mock.patch.object(nn.Module, "_apply", apply), without_cuda(), _WithoutMemory(mode):
        yield became


def _converted(tensor: Tensor, convert: Callable[[Tensor], Tensor], became: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """Return ``tensor`` converted, the same one for every module that shares it: fake parameters cannot be changed in place."""
    with torch.no_grad():
        changed = convert(tensor)
    if changed is tensor:
        return tensor
    if id(tensor) not in became:
        new = nn.Parameter(changed, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else changed
        became[id(tensor)] = tensor, new
    return became[id(tensor)][1]


def load_without_memory(target: str, overrides: Mapping[str, Any]) -> tuple[Workload, dict[str, Any]]:
    """Return what ``target`` names with its large tensors fake from the start; really made where the code cannot do without values.

    Raises:
        AutobatchError: as ``load_target``.
    """
    try:
        with without_memory() as became:
            work, options = load_target(target, overrides)
            for group in work.optimizer.param_groups if work.optimizer is not None else ():
                group["params"] = [_newest(parameter, became) for parameter in group["params"]]
            return work, options
    except InvalidRequest:
        raise
    except Exception:  # noqa: BLE001 whatever code does that meets tensors without values; the second attempt tells its real errors
        with without_cuda():
            return load_target(target, overrides)


def _newest(tensor: Tensor, became: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor:
    while id(tensor) in became:
        tensor = became[id(tensor)][1]
    return tensor


def fake_mode_of(work: Workload) -> FakeTensorMode:
    """Return the mode that the step's fake tensors are of, a new one where it has none."""
    held = [*work.model.parameters(), *work.model.buffers(), *tree_leaves(work.make_batch(1))]
    found = next((tensor for tensor in held if isinstance(tensor, FakeTensor)), None)
    if found is not None and found.fake_mode.allow_non_fake_inputs:
        return found.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)
