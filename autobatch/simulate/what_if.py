"""What would change the batch size of a step: the same step, with one thing done otherwise, to be simulated again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils._pytree import tree_leaves

from autobatch.simulate.step import repeated_blocks
from autobatch.workload.batches import map_tensors
from autobatch.workload.workload import Workload

_FUSED = ("Adam", "AdamW", "SGD", "Adagrad")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing done otherwise.

    Attributes:
        name: what, in words that follow "with".
        work: the step with it.
        checkpointed: whether its repeated blocks are computed again in the backward pass.
        expandable: whether the allocator's segments can grow.
    """

    name: str
    work: Workload
    checkpointed: bool = False
    expandable: bool = False


def changes(work: Workload) -> list[Change]:
    """Return what may let ``work`` take more rows."""
    found = []
    if work.precision not in ("bf16", "fp16"):
        found.append(Change(name="bf16 autocast", work=dataclasses.replace(work, precision="bf16")))
    if work.mode == "train" and repeated_blocks(work.model):
        found.append(Change(name="activation checkpointing of its blocks", work=work, checkpointed=True))
    if work.optimizer is not None:
        found += [Change(name=name, work=dataclasses.replace(work, optimizer=other)) for name, other in _optimizers(work.optimizer)]
    found.append(Change(name="expandable segments", work=work, expandable=True))
    if (length := _sequence(work)) is not None:
        shorter = dataclasses.replace(work, make_batch=_shortened(work.make_batch, length, length // 2))
        found.append(Change(name=f"sequences of {length // 2} instead of {length}", work=shorter))
    return found


def _optimizers(optimizer: Optimizer) -> list[tuple[str, Optimizer]]:
    """Return other optimizers over the same parameters, with their names."""
    name, parameters = type(optimizer).__name__, [p for group in optimizer.param_groups for p in group["params"]]
    others: list[tuple[str, Optimizer]] = []
    if name != "SGD" or any(group.get("momentum") for group in optimizer.param_groups):
        others.append(("SGD without momentum", SGD(parameters, lr=1e-3)))
    if name in ("Adam", "AdamW"):
        others.append((f"8-bit {name}", EightBit(parameters)))
    if name in _FUSED and not any(group.get("fused") for group in optimizer.param_groups):
        fused = copy.copy(optimizer)
        fused.param_groups = [{**group, "fused": True, "foreach": False} for group in optimizer.param_groups]
        others.append((f"fused {name}", fused))
    return others


class EightBit(Optimizer):
    """The memory of an 8-bit Adam: two moments of one byte a number and one fp32 scale for every 2048, no temporaries.

    As in arXiv 2110.02861, section 2; parameters of fewer than 4096 numbers keep moments of 32 bits, as its implementation does. It holds
    what such an optimizer holds and changes nothing.
    """

    _BLOCK, _SMALL = 2048, 4096

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make the state where it is not there yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or self.state[parameter]:
                    continue
                small = parameter.numel() < self._SMALL
                for moment in ("first", "second"):
                    self.state[parameter][moment] = torch.zeros_like(parameter, dtype=torch.float32 if small else torch.uint8)
                    if not small:
                        self.state[parameter][f"{moment} scale"] = torch.zeros(-(-parameter.numel() // self._BLOCK))
        return None if closure is None else closure()


def _sequence(work: Workload) -> int | None:
    """Return how many tokens a row has, ``None`` where the batch does not look like rows of tokens."""
    lengths = {
        leaf.shape[1]
        for leaf in tree_leaves(work.make_batch(1))
        if isinstance(leaf, Tensor) and leaf.dim() == 2 and leaf.dtype in (torch.int32, torch.int64)
    }
    return lengths.pop() if len(lengths) == 1 and min(lengths) >= 2 else None


def _shortened(make_batch: Callable[[int], Any], length: int, shorter: int) -> Callable[[int], Any]:
    def cut(leaf: Tensor) -> Tensor:
        return leaf[:, :shorter] if leaf.dim() >= 2 and leaf.shape[1] == length else leaf

    return lambda rows: map_tensors(make_batch(rows), cut)
