"""The device contract, and the budget a training step may use. No torch here."""

from __future__ import annotations

import dataclasses
import math
from contextlib import AbstractContextManager
from typing import Protocol

from autobatch.core.errors import InvalidRequest
from autobatch.core.records import MemoryReading, Outcome, Peak, Setting
from autobatch.core.units import format_bytes, parse_bytes


class Device(Protocol):
    """What a prober needs of a device. Every amount is in bytes.

    An implementation guarantees:

    - Inside ``cap(limit, held)`` an allocation that would take this process's tensors past ``limit`` bytes raises, as it would on a full
      device; ``held`` bytes of the workload's tensors are resident at entry. The former limit is back afterwards, whatever happened.
    - ``peak()`` is exact enough to predict from: the same step gives the same peak to a fraction of a percent.
    - ``classify`` names only what it knows to be about memory or a kernel's limits; anything else is the user's error and ``None``.
    - ``session()`` is held around all trials and undone at its end; ``release()`` never raises.

    Attributes:
        name: torch's name of it, ``"cuda:0"`` or ``"cpu"``.
        description: what it is, ``"NVIDIA H200"``.
        notes: what the reader of an answer should know about how it is measured here.
        capability: CUDA's compute capability, ``None`` for what is no such card.
        is_host: whether its memory is the host's.
        spills: whether the driver moves what does not fit to host memory instead of failing, so that only the time tells.
    """

    name: str
    description: str
    notes: tuple[str, ...]
    capability: tuple[int, int] | None
    is_host: bool
    spills: bool

    def session(self) -> AbstractContextManager[None]:
        """Hold what the readings need for as long as the probing lasts."""

    def memory(self) -> MemoryReading:
        """Return what the device's memory looks like now."""

    def cap(self, limit: int, held: int) -> AbstractContextManager[None]:
        """Hold this process's tensors to ``limit`` bytes."""

    def reset_peaks(self) -> None:
        """Start the peaks again from what is held now."""

    def peak(self) -> Peak:
        """Return the highest use since the last reset."""

    def allocated(self) -> int:
        """Return the bytes held by tensors now."""

    def retries(self) -> int | None:
        """Return how often the allocator has given its cache back and tried again, ``None`` where that is not counted."""

    def driver_used(self) -> int | None:
        """Return the bytes in use on the whole device as the driver reports them."""

    def synchronize(self) -> None:
        """Wait for everything under way."""

    def release(self) -> None:
        """Give cached blocks back."""

    def classify(self, error: BaseException, *, ran_before: bool = False) -> Outcome | None:
        """Return the outcome that ``error`` stands for, ``None`` for the user's own errors.

        ``ran_before`` says that the same step ran with fewer rows, which decides messages that are in doubt.
        """

    def environment(self) -> dict[str, str]:
        """Return what an answer depends on: the hardware and its versions."""


def set_budget(reading: MemoryReading, memory_budget: int | float | str | None, margin: float) -> tuple[int, int, tuple[str, ...]]:
    """Return the budget and the cap in bytes, and notes: what a step may use, and what a trial may use.

    Args:
        reading: the device's memory now.
        memory_budget: bytes, text such as ``"20GiB"`` or ``"50%"``, or a fraction of the capacity; ``None`` for all that can be had.
        margin: fraction of the budget that every trial leaves free.

    Raises:
        InvalidRequest: the budget is no amount of memory or larger than the device; the margin is outside [0, 1).
    """
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < 1:
        raise InvalidRequest(f"margin is {margin!r}; a fraction from 0 to below 1 is wanted, for example 0.05 for 5 %.")
    wanted = reading.obtainable if memory_budget is None else _amount(memory_budget, reading.capacity)
    if wanted > reading.capacity:
        raise InvalidRequest(
            f"memory_budget {format_bytes(wanted)} is more than the device has: {format_bytes(reading.capacity)}. "
            "Give less, or leave it out for all that is free."
        )
    budget, notes = wanted, []
    if wanted > reading.obtainable:
        budget = reading.obtainable
        holders = ", ".join(f"pid {other.pid}" for other in reading.others)
        notes.append(
            f"the budget asked for, {format_bytes(wanted)}, was narrowed to the {format_bytes(budget)} that can be had now"
            + (f"; others hold the rest ({holders})" if holders else "")
        )
    return budget, math.floor(budget * (1 - margin)), tuple(notes)


def narrowed(setting: Setting, now: MemoryReading) -> Setting | None:
    """Return ``setting`` with the budget that is left ``now``; ``None`` while all that a trial may use can still be had.

    The margin is there for what comes and goes on the device. Only when less is left than a trial may use, the budget is what is left.
    """
    if now.obtainable >= setting.cap:
        return None
    budget, known = now.obtainable, {other.pid: other.used or 0 for other in setting.reading.others}
    grown = [(other, (other.used or 0) - known.get(other.pid, 0)) for other in now.others]
    came = ", ".join(f"{other.name or 'a process'} (pid {other.pid}) {format_bytes(more)}" for other, more in grown if more > 0)
    note = (
        f"during the search the memory that can be had fell from {format_bytes(setting.budget)} to {format_bytes(budget)}"
        f"{f': {came} came' if came else ''}; the answer was confirmed within what was left"
    )
    cap = math.floor(budget * (1 - setting.margin))
    return dataclasses.replace(setting, reading=now, budget=budget, cap=cap, notes=(*setting.notes, note))


def _amount(memory_budget: int | float | str, capacity: int) -> int:
    """Return the bytes that ``memory_budget`` names; a number of at most 1 is a fraction of ``capacity``."""
    if isinstance(memory_budget, str):
        text = memory_budget.strip()
        try:
            memory_budget = float(text.rstrip("%"))
        except ValueError:
            return parse_bytes(text)
        if text.endswith("%"):
            memory_budget = memory_budget / 100 * capacity
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, (int, float)) or not 0 < memory_budget < math.inf:
        raise InvalidRequest(
            f"memory_budget is {memory_budget!r}; give bytes, text such as '20GiB', or a fraction of the device such as 0.5."
        )
    return math.floor(capacity * memory_budget) if memory_budget <= 1 else math.floor(memory_budget)
