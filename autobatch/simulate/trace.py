"""One training step on fake CPU tensors: every storage from birth to death, without memory and without arithmetic.

The user's step runs as it is, twice, so that optimizer state is resident in the second iteration. Storages, not tensors, are followed:
views share one, saved activations keep theirs alive as long as autograd holds them, and a storage's end is told by its weak reference.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autobatch.simulate.loading import fake_mode_of, without_cuda
from autobatch.workload.batches import map_tensors
from autobatch.workload.workload import Workload

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


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every storage that an operator returns, and its end."""

    def __init__(self, trace: Trace, temporaries: Callable[[str, tuple[Any, ...]], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace, self._temporaries = trace, temporaries
        self.phase, self.modules, self.paused = "", [""], False
        self.ended = False
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = str(func.overloadpacket)
        inside = 0 if self.paused else self._begin_temporary(operator, args)
        result = func(*args, **(kwargs or {}))
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


def fake_copy(workload: Workload, mode: FakeTensorMode) -> Workload:
    """Return ``workload`` with fake tensors in place of its model's and optimizer's; nothing of the original is touched or copied."""
    memo: dict[int, Any] = {}
    tensors: list[Tensor] = [*workload.model.parameters(), *workload.model.buffers()]
    if workload.optimizer is not None:
        tensors += [value for state in workload.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    for tensor in tensors:
        memo[id(tensor)] = _fake(tensor, mode)
    with mode:
        model = copy.deepcopy(workload.model, memo)
        optimizer = copy.deepcopy(workload.optimizer, memo) if workload.optimizer is not None else None
    return Workload(
        model=model,
        make_batch=workload.make_batch,
        loss=workload.loss,
        optimizer=optimizer,
        mode=workload.mode,
        precision=workload.precision,
    )


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How the step runs where it is traced for; by default as it does on the CPU.

    Attributes:
        around: gives the context in which forward and loss run.
        temporaries: bytes that an operator takes inside itself, by its name and its arguments.
        prepare: called with the optimizer before the first step.
        change: called with the fake copy of the model before anything runs.
    """

    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    temporaries: Callable[[str, tuple[Any, ...]], int] = lambda _operator, _arguments: 0
    prepare: Callable[[Any], None] = lambda _optimizer: None
    change: Callable[[nn.Module], None] = lambda _model: None


def trace_step(workload: Workload, batch_size: int, manner: Manner | None = None) -> Trace:
    """Return two iterations of ``workload``'s step on ``batch_size`` rows.

    Args:
        workload: any; its tensors are not touched.
        batch_size: rows in a batch.
        manner: how the step runs on the device it is traced for.

    Raises:
        Exception: what the step raises; on values it depends on, torch's ``DataDependentOutputException`` and its like.
    """
    mode, trace = fake_mode_of(workload), Trace(batch_size)
    work, manner = fake_copy(workload, mode), manner or Manner()
    manner.prepare(work.optimizer)
    manner.change(work.model)
    recorder = _Recorder(trace, manner.temporaries)
    with _collected_by_hand(), without_cuda(), mode, recorder, _module_names(work.model, recorder):
        _see_resident(work, recorder)
        train = work.mode == "train"
        work.model.train(train)
        with torch.set_grad_enabled(train):
            for _ in range(2):
                recorder.mark(FORWARD)
                recorder.paused = True  # how the batch is made is the host's affair
                batch = _fake_batch(work, batch_size, mode)
                recorder.paused = False
                for leaf in tree_leaves(batch):
                    if isinstance(leaf, Tensor):
                        recorder.see(leaf, "batch", INPUT)
                with manner.around():
                    loss, _output = work.loss(work.model, batch)
                recorder.mark(BACKWARD)
                if loss is not None:
                    torch.autograd.backward(loss)
                _tag_gradients(work, recorder)
                recorder.mark(OPTIMIZER)
                if work.optimizer is not None:
                    work.optimizer.step()
                    _tag_states(work, recorder)
                work.model.zero_grad(set_to_none=True)
                gc.collect()
        recorder.ended = True  # what ends from here on ends with the copy
    _tag_temporaries(trace)
    return trace


@contextlib.contextmanager
def _collected_by_hand() -> Iterator[None]:
    """Keep Python from collecting cycles at moments of its own, so that a trace is the same every time."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _fake_batch(work: Workload, batch_size: int, mode: FakeTensorMode) -> Any:
    return map_tensors(work.make_batch(batch_size), lambda leaf: leaf if isinstance(leaf, FakeTensor) else mode.from_tensor(leaf))


def _see_resident(work: Workload, recorder: _Recorder) -> None:
    for parameter in work.model.parameters():
        recorder.see(parameter, "resident", PARAMETER)
    for buffer in work.model.buffers():
        recorder.see(buffer, "resident", BUFFER)
    _tag_states(work, recorder)


def _tag_states(work: Workload, recorder: _Recorder) -> None:
    if work.optimizer is None:
        return
    for state in work.optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                recorder.see(value, "optimizer", STATE)


def _tag_gradients(work: Workload, recorder: _Recorder) -> None:
    for parameter in work.model.parameters():
        if parameter.grad is not None:
            recorder.see(parameter.grad, "gradient", GRADIENT)


def _tag_temporaries(trace: Trace) -> None:
    """Call temporary what ended in the phase that made it."""
    for storage in trace.storages:
        if storage.tag == ACTIVATION and storage.died == storage.phase:
            storage.tag = TEMPORARY


@contextlib.contextmanager
def _module_names(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Tell the recorder which module is running."""
    handles = []
    for name, module in model.named_modules():

        def enter(_module: nn.Module, _inputs: Any, name: str = name) -> None:
            recorder.modules.append(name)

        def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            if len(recorder.modules) > 1:
                recorder.modules.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
