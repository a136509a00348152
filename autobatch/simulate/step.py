"""From a workload to a step that can be replayed at any batch size, and how far it is to be believed."""

from __future__ import annotations

import functools
import logging
import traceback
from dataclasses import dataclass, field
from typing import Any

import psutil
from torch import nn

from autobatch.core.errors import AutobatchError, WorkloadFailed
from autobatch.core.units import MIB, format_bytes
from autobatch.simulate.affine import AffineTrace, NotAffine, points_of
from autobatch.simulate.apart import Died, run_apart, run_each_apart, told
from autobatch.simulate.cuda_semantics import autocast, on_cuda, operator_temporaries, use_foreach
from autobatch.simulate.trace import Manner, Trace, trace_step
from autobatch.workload.state import keep_random_state
from autobatch.workload.workload import Workload

# Batch sizes that are traced: two for the lines, one to hold against them. Odd and even, none of them 1, which operators treat apart.
SIZES = (3, 8, 5)
# Batch sizes of a traced run on real tensors.
_REAL = (4, 8)
_FLASH = (8, 0)  # from this compute capability on there are flash kernels
# Share of the memory by which an estimate may be off: for all steps, and more for what no trace shows.
_BASE, _CONVOLUTION, _RECURRENT, _APPROXIMATE = 0.03, 0.05, 0.05, 0.10
# Kernels that are loaded when they are first used, beside the bare context: an assumption, cuDNN's being the larger part.
_CUDNN_KERNELS, _OTHER_KERNELS = 256 * MIB, 64 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedStep:
    """A step that can be replayed.

    Attributes:
        trace: its storages at any batch size.
        kernels: bytes of kernels that it has loaded beside the bare context.
        uncertainty: share of the memory by which it may be off.
        notes: what the trace could not see.
        expected: its peaks as (batch size, bytes).
        replayed: what was replayed of it before, by batch size, limit, workspace and settings.
    """

    trace: AffineTrace
    kernels: int
    uncertainty: float
    notes: tuple[str, ...]
    expected: tuple[tuple[int, int], ...] = ()
    replayed: dict[Any, Any] = field(default_factory=dict, compare=False)

    @property
    def shared(self) -> dict[str, Any]:
        """What its probers on several cards have in common."""
        return {"expected": self.expected, "replayed": self.replayed}


def trace_for(work: Workload, capability: tuple[int, int], *, checkpointed: bool = False) -> SimulatedStep:
    """Return ``work``'s step as it runs on cards of a compute capability, with its repeated blocks ``checkpointed`` or as it is.

    It is traced in a process apart, on tensors without memory; where it depends on values, on real ones at two small sizes.

    Raises:
        WorkloadFailed: it raised, or ended the process; the message says what it raised.
    """
    # The flash kernels are the only thing here that tells cards apart, and most steps have none.
    newest = _simulated(work, _FLASH, checkpointed)
    flash = any("flash" in storage.operator for storage in newest.trace.of.storages)
    return newest if capability >= _FLASH or not flash else _simulated(work, (7, 5), checkpointed)


@functools.lru_cache(maxsize=8)
def _simulated(work: Workload, capability: tuple[int, int], checkpointed: bool) -> SimulatedStep:
    try:
        with keep_random_state():
            trace, how = _traced(work, capability, checkpointed)
            if trace is None:
                _check_room(work, how)
                trace, how = run_apart(functools.partial(_really, work, capability, checkpointed, how), hollow=False)
    except Died as error:
        raise WorkloadFailed(
            f"The step cannot be simulated: {error} in which it was traced. Likely something in it, or in torch, aborts without a card. "
            "Run it on one, where a worker survives that: autobatch probe."
        ) from error
    convolves, recurs = (any(isinstance(m, kind) for m in work.model.modules()) for kind in (nn.modules.conv._ConvNd, nn.RNNBase))
    unseen = {
        how: _APPROXIMATE if how else 0.0,
        "convolution workspaces follow a rule, no measurement": _CONVOLUTION if convolves else 0.0,
        "the buffers of cuDNN's recurrent layers are derived, not measured": _RECURRENT if recurs else 0.0,
    }
    notes = [f"simulated: kernels, context and fragmentation may differ by {100 * _BASE:.0f} % of the memory"]
    notes += [f"{what}; the interval allows {100 * share:.0f} % for that" for what, share in unseen.items() if share]
    kernels = _CUDNN_KERNELS if convolves or recurs else _OTHER_KERNELS
    return SimulatedStep(
        trace=trace, kernels=kernels, expected=points_of(trace), uncertainty=_BASE + sum(unseen.values()), notes=tuple(notes)
    )


def _manner(work: Workload, checkpointed: bool) -> Manner:
    return Manner(
        around=lambda: autocast(work.precision),
        temporaries=operator_temporaries,
        prepare=use_foreach,
        change=checkpoint_blocks if checkpointed else lambda _: None,
    )


def _traced(work: Workload, capability: tuple[int, int], checkpointed: bool) -> tuple[AffineTrace | None, str]:
    """Return the step traced without memory, and in which way it is approximate; no trace where it cannot do without values, and why."""
    try:
        traces = run_each_apart([functools.partial(trace_size, work, capability, checkpointed, size) for size in SIZES])
    except (AutobatchError, Died):
        raise
    except Exception as error:  # noqa: BLE001 whatever a step does that meets tensors without values; a real run tells its real errors
        return None, told(error)
    small, large, check = traces
    try:
        return AffineTrace.through(small, large, check), ""
    except NotAffine as error:
        return AffineTrace.nearly(
            check, large
        ), f"{error}: sizes other than {check.batch_size} and {large.batch_size} rows are interpolated"


def trace_size(work: Workload, capability: tuple[int, int], checkpointed: bool, size: int) -> Trace:
    """Return the trace of ``size`` rows; meant for a process that ends with it."""
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True  # this process ends with the trace, which says it itself
    iterations = 1 if size == SIZES[2] else 2
    with on_cuda(capability):
        return trace_step(work, size, _manner(work, checkpointed), silent=size != SIZES[0], iterations=iterations)


def _really(work: Workload, capability: tuple[int, int], checkpointed: bool, why: str) -> tuple[AffineTrace, str]:
    """Return the step traced on real CPU tensors, and that it was."""
    manner = _manner(work, checkpointed)
    try:
        with on_cuda(capability):
            small, large = (trace_step(work, size, manner, real=True, silent=True) for size in _REAL)
    except AutobatchError:
        raise
    except Exception as error:  # noqa: BLE001 told as it is
        raise WorkloadFailed(
            f"The training step raised {type(error).__name__} on {_REAL[0]} rows: {error}", traceback_text=traceback.format_exc()
        ) from None
    how = f"the step depends on values ({why}), so it was run on real CPU tensors at {small.batch_size} and {large.batch_size} rows"
    return AffineTrace.nearly(small, large), how


def _check_room(work: Workload, why: str) -> None:
    """Refuse a real run that this machine has no memory for: parameters, gradients and two moments of each."""
    needed = 4 * sum(tensor.numel() * tensor.element_size() for tensor in work.model.parameters())
    available = psutil.virtual_memory().available
    if needed > available // 2:
        raise WorkloadFailed(
            f"The step depends on values ({why}), and there is no room here to run it for real: parameters, gradients and optimizer state "
            f"take {format_bytes(needed)}, and {format_bytes(available)} are free. Take .item() and boolean masks out of the step, or "
            "probe it on a card: autobatch probe."
        )


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


def checkpoint_blocks(model: nn.Module) -> None:
    """Have the repeated blocks of ``model`` computed again in the backward pass instead of kept."""
    from torch.utils.checkpoint import checkpoint

    for block in repeated_blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
