"""Simulated work as a finder is given it: a case on a simulated card."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.core.options import PlanRequest, SearchOptions
from autobatch.loop import Run
from autobatch.probe.inline import InlineProber
from autobatch.workload.state import keep_random_state
from autobatch.workload.workload import build_workload
from benchmarks.peers.card import Card, SimulatedDevice, Tiny, rows
from benchmarks.peers.finders import LIMIT

# How far the expectation that a search may begin with is off, each part on its own.
_OFF = 0.1


class SimulatedWork:
    """The training step of one case.

    Args:
        card: where it runs.
        readable: whether finders may look at the card's memory.
    """

    def __init__(self, card: Card, *, readable: bool) -> None:
        self._card, self.ledger, self.dataset = card, card.ledger, card.case.dataset
        self.kind = "cuda" if readable else "cpu"
        self.begin, self.run = card.begin, card.run
        torch.manual_seed(0)
        self.model = Tiny()

    def module(self) -> nn.Module:
        """Return the model of a few weights whose passes take the card's memory."""
        return self.model

    def rows(self, size: int) -> Tensor:
        """Return a batch of ``size`` rows."""
        return rows(size)

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Return a new optimizer."""
        return torch.optim.AdamW(module.parameters(), lr=1e-3)

    def speaking(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: the card's errors are CUDA's already."""
        return contextlib.nullcontext()

    def own_way(self, *, expecting: bool = False) -> int:
        """Return the answer of what is behind ``autobatch.find``: its loop, its prober, and the card by its device protocol."""
        workload = build_workload(self.model, make_batch=lambda size: {"x": rows(size)}, optimizer=self.optimizer(self.model))
        device: Any = SimulatedDevice(self._card)
        expected = self._expected() if expecting else ()
        with keep_random_state(), contextlib.closing(InlineProber(workload, device, margin=0.0, foreseen=lambda: (expected, ""))) as prober:
            return Run(prober, PlanRequest(dataset_size=self.dataset), SearchOptions()).plan().batch_size

    def _expected(self) -> tuple[tuple[int, int], ...]:
        """Return what a simulation of the step would expect, off by up to 10 %, as (batch size, bytes)."""
        case, draw = self._card.case, random.Random(self._card.case.name)
        fixed, row = (part * (1 + draw.uniform(-_OFF, _OFF)) for part in (case.base + case.state, case.per_sample))
        kink = max(2, int((case.optimizer - fixed) / row))
        return tuple((size, int(max(fixed + row * size, case.optimizer))) for size in (1, kink, LIMIT))
