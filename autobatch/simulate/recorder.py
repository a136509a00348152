"""Storages from birth to death: what a traced step leaves behind, and the mode that writes it down."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# What a storage is there for, as far as it shows.
PARAMETER, BUFFER, STATE = "parameter", "buffer", "optimizer state"
GRADIENT, INPUT, ACTIVATION, TEMPORARY = "gradient", "input", "activation", "temporary"
FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"


@dataclass(slots=True)
class Storage:
    """One stretch of memory that a step uses.

    Attributes:
        size: bytes asked for.
        phase: in which it was made: forward, backward or optimizer; empty before the first iteration.
        operator: the operator that made it.
        module: dotted name of the module that was running.
        tag: what it is there for.
        died: phase in which it ended, ``None`` while it is held.
    """

    size: int
    phase: str
    operator: str
    module: str
    tag: str = ACTIVATION
    died: str | None = None


@dataclass(slots=True)
class Trace:
    """The storages of two iterations, and in which order they came and went.

    Attributes:
        batch_size: rows in each iteration's batch.
        storages: every storage, in the order of birth.
        events: ``index`` for the birth and ``~index`` for the death of a storage.
        marks: where each phase begins: the number of events before it, and its name.
    """

    batch_size: int
    storages: list[Storage] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)

    def peak(self) -> int:
        """Return the bytes asked for at the highest point."""
        now = highest = 0
        for event in self.events:
            now += self.storages[event].size if event >= 0 else -self.storages[~event].size
            highest = max(highest, now)
        return highest


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every storage that an operator returns, and its end."""

    def __init__(self, trace: Trace, temporaries: Callable[[str, tuple[Any, ...]], int], *, real: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace, self._temporaries, self._real = trace, temporaries, real
        self.phase, self.modules, self.paused = "", [""], False
        self.ended = False
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # asks for a device or a layout
            return func(*args, **(kwargs or {}))
        operator = str(func.overloadpacket)
        inside = 0 if self.paused else self._begin_temporary(operator, args)
        try:
            result = func(*args, **(kwargs or {}))
        except NotImplementedError:
            if self._real:
                result = _shaped(func, args, kwargs or {})
            else:
                raise
        if not self.paused:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.see(leaf, operator)
        if inside:
            self.trace.events.append(~inside)
        return result

    def _begin_temporary(self, operator: str, args: Any) -> int:
        """Write down the birth of what ``operator`` takes inside itself, and return its index, 0 for nothing."""
        size = self._temporaries(operator, args)
        if not size:
            return 0
        index = len(self.trace.storages)
        self.trace.storages.append(Storage(size, self.phase, operator, self.modules[-1], TEMPORARY, self.phase))
        self.trace.events.append(index)
        return index

    def see(self, tensor: Tensor, operator: str, tag: str | None = None) -> None:
        """Take in the storage of ``tensor`` when it is new; give it ``tag``."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        index = self._live.get(key)
        if index is None:
            index = len(self.trace.storages)
            self._live[key] = index
            self.trace.storages.append(Storage(storage.nbytes(), self.phase, operator, self.modules[-1]))
            self.trace.events.append(index)
            weakref.finalize(storage, self._end, key, index).atexit = False
        if tag is not None:
            self.trace.storages[index].tag = tag

    def mark(self, phase: str) -> None:
        """Begin a phase."""
        self.phase = phase
        self.trace.marks.append((len(self.trace.events), phase))

    def _end(self, key: int, index: int) -> None:
        if self.ended:
            return
        if self._live.get(key) == index:
            del self._live[key]
        self.trace.storages[index].died = self.phase
        self.trace.events.append(~index)


def _shaped(func: Any, args: Any, kwargs: Any) -> Any:
    """Return tensors of the shapes that ``func`` gives, for an operator of CUDA's that the CPU has no kernel for."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shapes = func(*tree_map(lambda value: mode.from_tensor(value) if isinstance(value, Tensor) else value, (args, kwargs))[0], **kwargs)

    def real(value: Any) -> Any:
        return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value

    return tree_map(real, shapes)
