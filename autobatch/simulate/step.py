"""From a workload to a step that can be replayed at any batch size, and how far it is to be believed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)

from autobatch.core.errors import WorkloadFailed
from autobatch.simulate.affine import AffineTrace, NotAffine
from autobatch.simulate.cuda_semantics import cuda_semantics, operator_temporaries, use_foreach
from autobatch.simulate.trace import Manner, trace_step
from autobatch.workload.state import keep_random_state
from autobatch.workload.workload import Workload

# Batch sizes that are traced: two for the lines, one to hold against them. Odd and even, none of them 1, which operators treat apart.
_SIZES = (3, 8, 5)
_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
# Share of the memory by which an estimate may be off: for all steps, and more for what no trace shows.
_BASE, _CONVOLUTION, _RECURRENT = 0.03, 0.05, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedStep:
    """A step that can be replayed.

    Attributes:
        trace: its storages at any batch size.
        uncertainty: share of the memory by which it may be off.
        notes: what the trace could not see.
    """

    trace: AffineTrace
    uncertainty: float
    notes: tuple[str, ...]


@functools.lru_cache(maxsize=4)
def trace_for(work: Workload, capability: tuple[int, int], *, checkpointed: bool = False) -> SimulatedStep:
    """Return ``work``'s step as it runs on cards of a compute capability, with its repeated blocks ``checkpointed`` or as it is.

    Raises:
        WorkloadFailed: it depends on values, or does something else at another batch size.
    """
    # The flash kernels are the only thing here that tells cards apart.
    return _traced(work, (8, 0) if capability >= (8, 0) else min(capability, (7, 5)), checkpointed)


@functools.lru_cache(maxsize=4)
def _traced(work: Workload, capability: tuple[int, int], checkpointed: bool) -> SimulatedStep:
    again = functools.partial(cuda_semantics, work.precision, capability, keep_casts=False)
    manner = Manner(
        around=lambda: cuda_semantics(work.precision, capability),
        temporaries=operator_temporaries,
        prepare=use_foreach,
        change=functools.partial(checkpoint_blocks, again=again) if checkpointed else lambda _: None,
    )
    try:
        with keep_random_state():
            trace = AffineTrace.through(*(trace_step(work, size, manner) for size in _SIZES))
    except _VALUES as error:
        raise WorkloadFailed(
            f"The step cannot be simulated: {type(error).__name__}: {error}. It depends on values (.item(), boolean masks, unique), which "
            "tensors without memory have not. Probe it on a card: autobatch probe."
        ) from error
    except NotAffine as error:
        raise WorkloadFailed(f"The step cannot be simulated at every batch size: {error}. Probe it on a card: autobatch probe.") from error
    uncertainty, notes = _BASE, [f"simulated: kernels, context and fragmentation may differ by {_BASE:.0%} of the memory"]
    if any(isinstance(module, nn.modules.conv._ConvNd) for module in work.model.modules()):
        uncertainty += _CONVOLUTION
        notes.append(f"convolution workspaces are not traced; the interval allows {_CONVOLUTION:.0%} for them")
    if any(isinstance(module, nn.RNNBase) for module in work.model.modules()):
        uncertainty += _RECURRENT
        notes.append(f"cuDNN's recurrent layers keep other buffers than the CPU's; the interval allows {_RECURRENT:.0%} for them")
    return SimulatedStep(trace=trace, uncertainty=uncertainty, notes=tuple(notes))


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules of the longest run of like ones in a container: a transformer's blocks, a network's stages."""
    runs = []
    for container in model.modules():
        if isinstance(container, (nn.Sequential, nn.ModuleList)):
            by_kind: dict[type, list[nn.Module]] = {}
            for child in container:
                if any(True for _ in child.parameters()) and any(True for _ in child.children()):
                    by_kind.setdefault(type(child), []).append(child)
            runs += [run for run in by_kind.values() if len(run) > 1]
    return max(runs, key=len, default=[])


def checkpoint_blocks(model: nn.Module, *, again: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
    """Have the repeated blocks of ``model`` computed again in the backward pass, inside the context ``again``, instead of kept."""
    from torch.utils.checkpoint import checkpoint

    for block in repeated_blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))
