"""The prober without a card: a traced step, replayed in the caching allocator at any batch size."""

from __future__ import annotations

import itertools
from typing import Any

from autobatch.core.records import MemoryReading, Outcome, Peak, Probe, Setting
from autobatch.core.units import format_bytes
from autobatch.devices.base import set_budget
from autobatch.simulate.affine import AffineTrace, smallest_capacity
from autobatch.simulate.allocator import CachingAllocator, SimulatedOutOfMemory
from autobatch.simulate.allocator_settings import AllocatorSettings
from autobatch.simulate.blocks import Block
from autobatch.simulate.cards import Card
from autobatch.simulate.recorder import OPTIMIZER
from autobatch.workload.workload import Workload


class SimulatedProber:
    """Probes a step on a card that is not here.

    Args:
        workload: what was traced, for what a plan wants to know of it.
        trace: the step at any batch size.
        card: the card.
        settings: how the caching allocator behaves.
        memory_budget: bytes, text or fraction of the card; ``None`` for all that the context leaves.
        margin: fraction of the budget kept free.
        notes: what the trace could not see.
        context: bytes that the process takes beside its tensors; ``None`` for the card's bare context.
        expected: the trace's peaks as (batch size, bytes), for the search to begin near the answer.
        replayed: what was replayed of this trace before, shared by the probers of several cards.

    Raises:
        InvalidRequest: budget or margin cannot be meant.
    """

    def __init__(
        self,
        workload: Workload,
        trace: AffineTrace,
        card: Card,
        *,
        settings: AllocatorSettings | None = None,
        memory_budget: int | float | str | None = None,
        margin: float = 0.05,
        notes: tuple[str, ...] = (),
        context: int | None = None,
        expected: tuple[tuple[int, int], ...] = (),
        replayed: dict[Any, Any] | None = None,
    ) -> None:
        self._trace, self._card, self._settings = trace, card, settings or AllocatorSettings()
        self._replayed = {} if replayed is None else replayed
        outside = card.context if context is None else context
        reading = MemoryReading(capacity=card.total, free=max(0, card.total - outside), source="cards.json")
        budget, cap, narrowed = set_budget(reading, memory_budget, margin)
        resident = sum(trace.of.storages[event].size for event in trace.events[: trace.of.marks[0][0]] if event >= 0)
        self.setting = Setting(
            device=card.name,
            device_description=card.description,
            reading=reading,
            budget=budget,
            cap=cap,
            margin=margin,
            resident=resident,
            mode=workload.mode,
            precision=workload.precision,
            has_optimizer=workload.optimizer is not None,
            has_batch_norm=workload.has_batch_norm,
            group_lrs=workload.group_lrs,
            group_options=workload.group_options,
            batch_norm_momentum=workload.batch_norm_momentum,
            optimizer_name=type(workload.optimizer).__name__ if workload.optimizer else "",
            dataset_size=workload.dataset_size,
            environment={
                "card": card.description,
                "compute capability": "{}.{}".format(*card.capability),
                "total": format_bytes(card.total),
                "context": format_bytes(outside),
            },
            notes=(*narrowed, *workload.notes, *notes),
            evidence="simulated",
            expected=expected,
        )

    def probe(self, batch_size: int, *, steps: int = 3, confirm: bool = False) -> Probe:
        """Return what a step of ``batch_size`` rows would need; the second iteration of the trace stands for every later one."""
        key = batch_size, self.setting.cap, self._card.workspace, self._settings
        if key not in self._replayed:
            try:
                self._replayed[key] = self._replay(batch_size, self.setting.cap)
            except SimulatedOutOfMemory as error:
                self._replayed[key] = f"simulated: {format_bytes(error.requested)} more did not fit"
        if isinstance(self._replayed[key], str):
            return Probe(batch_size=batch_size, outcome=Outcome.OOM, confirmation=confirm, message=self._replayed[key])
        forward_backward, optimizer, retries = self._replayed[key]
        return Probe(
            batch_size=batch_size,
            outcome=Outcome.FIT,
            steps=steps,
            forward_backward=forward_backward,
            optimizer=optimizer if self.setting.has_optimizer else None,
            allocation_retries=retries,
            confirmation=confirm,
        )

    def rows_within(self, size: int, batch_size: int) -> int:
        """Return the rows that ``size`` bytes make up around ``batch_size``."""
        per_row = self._trace.peak(2 * batch_size) - self._trace.peak(batch_size)
        return int(size * batch_size / per_row) if per_row > 0 else 0

    def needed(self, batch_size: int) -> int:
        """Return the least bytes a trial has to be allowed for a step of ``batch_size`` rows."""
        return smallest_capacity(self._trace.events, self._trace.sizes(batch_size), self._settings) + self._card.workspace

    def close(self) -> None:
        """Do nothing: nothing is held."""

    def _replay(self, batch_size: int, cap: int) -> tuple[Peak, Peak, int]:
        """Return the peak outside and inside the optimizer's step, and how often the cache was given back."""
        card, sizes = CachingAllocator(cap, self._settings), self._trace.sizes(batch_size)
        if self._card.workspace:
            card.malloc(self._card.workspace)
        live: dict[int, Block] = {}
        peaks = {True: (0, 0), False: (0, 0)}
        events, marks = self._trace.events, [(0, ""), *self._trace.of.marks, (len(self._trace.events), "")]
        for (start, phase), (end, _) in itertools.pairwise(marks):
            card.peak_allocated, card.peak_reserved = card.allocated, card.reserved
            for event in events[start:end]:
                if event >= 0:
                    if sizes[event]:
                        live[event] = card.malloc(sizes[event])
                elif sizes[~event]:
                    card.free(live.pop(~event))
            stepping = phase == OPTIMIZER
            peaks[stepping] = max(peaks[stepping][0], card.peak_allocated), max(peaks[stepping][1], card.peak_reserved)
        (forward, reserved), (optimizer, optimizer_reserved) = peaks[False], peaks[True]
        return Peak(allocated=forward, reserved=reserved), Peak(allocated=optimizer, reserved=optimizer_reserved), card.retries
