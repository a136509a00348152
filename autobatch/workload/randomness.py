"""Random states: those of the process, and the generators that a data loader, a model or a step holds of its own."""

from __future__ import annotations

import contextlib
import functools
import random
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from autobatch.workload.undo import Undo, is_filled

# Lists longer than this are data, not where a generator is kept.
_LONG = 10_000
# What torch's CUDA generators are seeded with until somebody seeds them.
_CUDA_SEED = 67280421310721


@contextlib.contextmanager
def keep_random_state(*holders: Any) -> Iterator[None]:
    """Put the random states of Python, NumPy, torch and every device back at the end, whatever happened.

    Args:
        holders: objects whose own generators are put back too: a data loader, its sampler, a data set.
    """
    undo = [*process_undo(), *(known for one in generators(*holders) if (known := generator_undo(one)) is not None)]
    try:
        yield
    finally:
        for one in undo:
            one()


def process_undo() -> list[Undo]:
    """Return functions that put the process's random states back as they are now."""
    python, array, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    undo: list[Undo] = [lambda: random.setstate(python), lambda: np.random.set_state(array), lambda: torch.set_rng_state(cpu), _cuda_undo()]
    if torch.backends.mps.is_available():  # pragma: no cover: needs a Mac
        mps = torch.mps.get_rng_state()
        undo.append(lambda: torch.mps.set_rng_state(mps))
    if hasattr(torch, "xpu") and torch.xpu.is_initialized():  # type: ignore[no-untyped-call]  # pragma: no cover: needs an Intel GPU
        xpu = torch.xpu.get_rng_state_all()
        undo.append(lambda: torch.xpu.set_rng_state_all(xpu))
    return undo


def _cuda_undo() -> Undo:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # pragma: no cover: needs a card
        states = torch.cuda.get_rng_state_all()
        return lambda: torch.cuda.set_rng_state_all(states)
    # CUDA may be started meanwhile. Its generators then begin with the seeds that were given before: they are given once more.
    tracker = getattr(torch.cuda, "_lazy_seed_tracker", None)
    seeds = [call for call in tracker.get_calls() if call] if tracker is not None else []

    def undo() -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # pragma: no cover: needs a card
            for generator in torch.cuda.default_generators:
                generator.manual_seed(_CUDA_SEED)
            for call in seeds:
                call[0]()

    return undo


def generator_undo(value: Any) -> Undo | None:
    """Return a function that puts the generator ``value`` back as it is now, ``None`` when it is none."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        python = value.getstate()
        return lambda: value.setstate(python)
    if isinstance(value, np.random.RandomState):
        array = value.get_state()
        return lambda: value.set_state(array)
    if isinstance(value, np.random.Generator):
        value = value.bit_generator
    if isinstance(value, np.random.BitGenerator):
        bits = value.state
        return lambda: setattr(value, "state", bits)
    return None


def generators(*holders: Any) -> Iterator[Any]:
    """Yield the generators that ``holders`` hold: in attributes, in short containers, in what a function has closed over."""
    todo, seen = list(holders), dict[int, Any]()
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, (str, bytes, int, float, torch.Tensor, type, types.ModuleType, types.NoneType)):
            continue
        seen[id(value)] = value
        if generator_undo(value) is not None:
            yield value
        else:
            todo += _held(value)


def _held(value: Any) -> list[Any]:
    if isinstance(value, (Mapping, list, tuple, set, frozenset)) and len(value) > _LONG:
        return []
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        return [*(cell.cell_contents for cell in value.__closure__ or () if is_filled(cell)), *(value.__defaults__ or ())]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    held = list(vars(value).values()) if hasattr(value, "__dict__") else []
    if isinstance(value, Mapping):
        held += value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        held += value
    return held
