"""A card without a card: it counts what a training step would allocate, and runs out of memory as CUDA does.

The model is a real one of a few weights, so that what a finder does to weights, buffers and random state can be seen; its memory is the
formula of a case. Nothing of any finder is replaced. Two doors lead to the card's memory, the ones that a finder would use on a real one:
autobatch's device protocol (:class:`SimulatedDevice`), and ``torch.cuda``'s functions (:func:`torch_cuda`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autobatch.core.records import MemoryReading, Outcome, Peak
from autobatch.core.units import format_bytes
from autobatch.devices import oom
from benchmarks.peers.cases import Case
from benchmarks.peers.ledger import Ledger

# Rows that are really computed with.
_REAL_ROWS = 4


class Card:
    """The memory of one case, and the ledger of who used it.

    Attributes:
        peak: bytes at the highest point since it was last reset.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.ledger = case, Ledger()
        self.peak = self.resident = case.base
        self._state, self._step = False, 0

    def begin(self, *, keeps_state: bool = False) -> None:
        """Begin a trial: no step was run, and there is no optimizer state unless the finder keeps one optimizer throughout."""
        self.ledger.open()
        self._step = 0
        self._state = self._state and keeps_state

    def forward_backward(self, size: int) -> None:
        """Run the passes of a step whose batch was asked to have ``size`` rows.

        Raises:
            torch.OutOfMemoryError: they need more than the card has, or so does the optimizer's step.
        """
        self._step += 1
        rows = self.case.rows(size)
        self.ledger.begin(size, rows)
        self._take(self.case.pass_peak(rows, self._step, self._state))
        self.ledger.passes_done()

    def optimizer_step(self) -> None:
        """Run the optimizer's step: from here on its state is resident."""
        self.ledger.optimizer_begins()
        self._take(self.case.step_peak())
        self._state = True
        self.ledger.passes_done()

    def run(self, size: int, steps: int = 3) -> None:
        """Run a trial as a training function would: ``steps`` whole steps with a new optimizer."""
        self.begin()
        for _ in range(steps):
            self.forward_backward(size)
            self.optimizer_step()

    def _take(self, peak: int) -> None:
        if peak > self.case.capacity:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {format_bytes(peak - self.resident)}. GPU 0 has a total capacity of "
                f"{format_bytes(self.case.capacity)} of which less is free."
            )
        self.peak = max(self.peak, peak)


class Tiny(nn.Module):
    """A model of a few weights, with buffers and dropout, whose passes take the card's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 4), nn.Unflatten(1, (2, 2)), nn.BatchNorm1d(2), nn.Dropout(0.1), nn.Flatten(), nn.Linear(4, 1)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the loss of ``x``, of shape (rows, 1)."""
        current().forward_backward(len(x))
        return {"loss": self.body(x[:_REAL_ROWS].expand(-1, 4)).square().mean()}


_CARDS: list[Card] = []


def current() -> Card:
    """Return the card that is in."""
    return _CARDS[-1]


@contextlib.contextmanager
def inserted(case: Case) -> Iterator[Card]:
    """Put a card in: every optimizer's step takes its memory."""
    _CARDS.append(Card(case))
    hook = register_optimizer_step_pre_hook(lambda *_: current().optimizer_step())
    try:
        yield current()
    finally:
        hook.remove()
        _CARDS.pop()


def rows(size: int) -> Tensor:
    """Return a batch of ``size`` rows that takes no memory."""
    return torch.zeros(1, 1).expand(size, 1)


class SimulatedDevice:
    """The card by autobatch's device protocol."""

    name, description = "cpu", "a formula"
    notes: tuple[str, ...] = ()
    capability: tuple[int, int] | None = None
    is_host, spills = False, False

    def __init__(self, card: Card) -> None:
        self._card = card

    def session(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def memory(self) -> MemoryReading:
        return MemoryReading(capacity=self._card.case.capacity, free=self._card.case.capacity, source="synthetic")

    def cap(self, limit: int, held: int) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        self._card.begin()
        return contextlib.nullcontext()

    def reset_peaks(self) -> None:
        self._card.peak = self._card.resident

    def peak(self) -> Peak:
        return Peak(allocated=self._card.peak)

    def allocated(self) -> int:
        return self._card.resident

    def retries(self) -> int | None:
        return None

    def driver_used(self) -> int | None:
        return None

    def synchronize(self) -> None: ...

    def release(self) -> None: ...

    def classify(self, error: BaseException, *, ran_before: bool = False) -> Outcome | None:
        return oom.classify(error, ran_before=ran_before)

    def environment(self) -> dict[str, str]:
        return {}


class _ToTheProcessor(torch.overrides.TorchFunctionMode):
    """Makes tensors that are asked for on ``cuda`` on the processor, where a few real bytes of them lie."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def there(value: Any) -> Any:
            return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value

        return function(*map(there, args), **{key: there(value) for key, value in (kwargs or {}).items()})


@contextlib.contextmanager
def torch_cuda(card: Card) -> Iterator[None]:
    """Let ``torch.cuda``'s functions tell of ``card`` what they tell of a real one, and let tensors be made "on" it."""
    facts = SimpleNamespace(total_memory=card.case.capacity, name="a formula", major=9, minor=0, multi_processor_count=100)

    def reset(*_: Any) -> None:
        card.peak = card.resident

    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: facts,
        "get_device_name": lambda *_: facts.name,
        "mem_get_info": lambda *_: (card.case.capacity - card.resident, card.case.capacity),
        "memory_allocated": lambda *_: card.resident,
        "memory_reserved": lambda *_: card.peak,
        "max_memory_allocated": lambda *_: card.peak,
        "max_memory_reserved": lambda *_: card.peak,
        "reset_peak_memory_stats": reset,
        "empty_cache": lambda: None,
        "synchronize": lambda *_: None,
        "device": lambda *_: contextlib.nullcontext(),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(_ToTheProcessor())
        yield
