"""One training step on fake CPU tensors: every storage from birth to death, without memory and without arithmetic.

The user's step runs as it is, twice, so that optimizer state is resident in the second iteration. Storages, not tensors, are followed:
views share one, saved activations keep theirs alive as long as autograd holds them, and a storage's end is told by its weak reference.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from autobatch.simulate.loading import fake_mode_of, without_cuda
from autobatch.simulate.recorder import ACTIVATION, BACKWARD, BUFFER, FORWARD, GRADIENT, INPUT, OPTIMIZER, PARAMETER, STATE, TEMPORARY
from autobatch.simulate.recorder import Recorder as Recorder
from autobatch.simulate.recorder import Trace as Trace
from autobatch.workload.batches import map_tensors
from autobatch.workload.workload import Workload


def copied(workload: Workload, change: Callable[[Tensor], Tensor], around: contextlib.AbstractContextManager[Any]) -> Workload:
    """Return ``workload`` with its model's and optimizer's tensors changed, made inside ``around``; nothing of the original is touched."""
    memo: dict[int, Any] = {}
    tensors: list[Tensor] = [*workload.model.parameters(), *workload.model.buffers()]
    if workload.optimizer is not None:
        tensors += [value for state in workload.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    # Optimizers read how many steps they have taken: a fake tensor made of a number still knows it.
    numbers = {id(tensor): tensor.item() for tensor in tensors if tensor.dim() == 0 and not _hollow(tensor)}
    with around:
        for tensor in tensors:
            new = torch.tensor(numbers[id(tensor)], dtype=tensor.dtype) if id(tensor) in numbers else change(tensor)
            memo[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        model = copy.deepcopy(workload.model, memo)
        optimizer = copy.deepcopy(workload.optimizer, memo) if workload.optimizer is not None else None
    return dataclasses.replace(workload, model=model, optimizer=optimizer)


def _shape(tensor: Tensor) -> Tensor:
    """Return an empty tensor of the same shape on the CPU, without memory inside a fake mode."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _hollow(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"


def _with_values(tensor: Tensor) -> Tensor:
    """Return a real tensor on the CPU: a copy, or small random numbers where there are no values to copy."""
    if not _hollow(tensor):
        return tensor.detach().cpu().clone()
    empty = _shape(tensor)
    return empty.normal_(0, 0.02) if tensor.is_floating_point() else empty.zero_()


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


def trace_step(
    workload: Workload, batch_size: int, manner: Manner | None = None, *, real: bool = False, silent: bool = False, iterations: int = 2
) -> Trace:
    """Return iterations of ``workload``'s step on ``batch_size`` rows.

    Args:
        workload: any; its tensors are not touched.
        batch_size: rows in a batch.
        manner: how the step runs on the device it is traced for.
        real: with real tensors on the CPU, for a step that depends on values.
        iterations: how many; from the second on, optimizer state is resident from the start.
        silent: whether what the step prints is swallowed; otherwise it is shown once.

    Raises:
        Exception: what the step raises; on values it depends on, torch's ``DataDependentOutputException`` and its like.
    """
    trace, manner = Trace(batch_size), manner or Manner()
    mode: FakeTensorMode | contextlib.nullcontext[None] = contextlib.nullcontext() if real else fake_mode_of(workload)
    work = copied(workload, _with_values if real else _shape, mode)
    manner.prepare(work.optimizer)
    manner.change(work.model)
    recorder = Recorder(trace, manner.temporaries, real=real)
    batches = _batches([work.make_batch(batch_size) for _ in range(iterations)], recorder, _with_values if real else _shape)
    with _collected_by_hand(), without_cuda(), mode, recorder, _module_names(work.model, recorder):
        _see_resident(work, recorder)
        work.model.train(work.mode == "train")
        with torch.set_grad_enabled(work.mode == "train"):
            for iteration, batch in enumerate(batches):
                recorder.mark(FORWARD)
                _see_batch(batch, recorder)
                with _swallowed(silent or iteration > 0), manner.around():
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
                gc.collect(1)
        recorder.ended = True  # what ends from here on ends with the copy
    _tag_temporaries(trace)
    return trace


def _batches(made: list[Any], recorder: Recorder, change: Callable[[Tensor], Tensor]) -> Iterator[Any]:
    """Yield the batches as inputs on the device; how they are made is the host's affair."""
    for batch in made:
        recorder.paused = True
        moved = map_tensors(batch, change)
        recorder.paused = False
        yield moved


def _see_batch(batch: Any, recorder: Recorder) -> None:
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            recorder.see(leaf, "batch", INPUT)


@contextlib.contextmanager
def _swallowed(really: bool) -> Iterator[None]:
    """Swallow what is printed."""
    with (
        contextlib.redirect_stdout(io.StringIO() if really else sys.stdout),
        contextlib.redirect_stderr(io.StringIO() if really else sys.stderr),
    ):
        yield


@contextlib.contextmanager
def _collected_by_hand() -> Iterator[None]:
    """Keep Python from collecting cycles at moments of its own, so that a trace is the same every time."""
    was_on = gc.isenabled()
    gc.disable()
    gc.freeze()  # what is here already need not be looked at each time
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def _see_resident(work: Workload, recorder: Recorder) -> None:
    for parameter in work.model.parameters():
        recorder.see(parameter, "resident", PARAMETER)
    for buffer in work.model.buffers():
        recorder.see(buffer, "resident", BUFFER)
    _tag_states(work, recorder)


def _tag_states(work: Workload, recorder: Recorder) -> None:
    if work.optimizer is None:
        return
    for state in work.optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                recorder.see(value, "optimizer", STATE)


def _tag_gradients(work: Workload, recorder: Recorder) -> None:
    for parameter in work.model.parameters():
        if parameter.grad is not None:
            recorder.see(parameter.grad, "gradient", GRADIENT)


def _tag_temporaries(trace: Trace) -> None:
    """Call temporary what ended in the phase that made it."""
    for storage in trace.storages:
        if storage.tag == ACTIVATION and storage.died == storage.phase:
            storage.tag = TEMPORARY


@contextlib.contextmanager
def _module_names(model: nn.Module, recorder: Recorder) -> Iterator[None]:
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
