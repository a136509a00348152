"""What a training step changes beside model and optimizer: a moving average of the weights, a scaler, a scheduler that it names."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from autobatch.core.units import MIB
from autobatch.workload.randomness import generator_undo
from autobatch.workload.undo import is_filled

_STATE = (nn.Module, Optimizer, LRScheduler, torch.amp.GradScaler, DataLoader)

# A tensor of more bytes that wants no gradient is data, which a step reads.
_DATA = 16 * MIB


def held_by(*functions: Any) -> tuple[Any, ...]:
    """Return what the ``functions`` name that training changes: in variables closed over, arguments kept, globals and attributes.

    Only one step is followed, and only state of training is returned: lists, loggers and trainers stay as a trial leaves them.
    """
    named = [value for function in functions for value in _named(function)]
    return tuple({id(value): value for value in (*functions, *named) if _is_state(value)}.values())


def _is_state(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad or value.nbytes <= _DATA
    return isinstance(value, _STATE) or generator_undo(value) is not None


def _named(function: Any) -> Iterator[Any]:
    if isinstance(function, functools.partial):
        yield from (*function.args, *function.keywords.values())
        yield from _named(function.func)
    elif isinstance(function, types.MethodType):
        yield function.__self__
        yield from getattr(function.__self__, "__dict__", {}).values()
        yield from _named(function.__func__)
    elif isinstance(function, types.FunctionType):
        yield from (cell.cell_contents for cell in function.__closure__ or () if is_filled(cell))
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        yield from (function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__)
    else:
        yield from getattr(function, "__dict__", {}).values()
