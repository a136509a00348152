"""The finders, each called through its own public interface: name, package, options, and how it is called.

A finder that has a margin or a limit of its own comes twice: as it is shipped, and with both out of the way, so that every finder is
asked the same question. Those that want a training function get the same one; those that want a model get the same model.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from autobatch.core.errors import NoBatchSizeFits
from benchmarks.peers.ledger import Ledger

LIMIT = 2**20


class Work(Protocol):
    """What a finder is given to search on, simulated or real.

    Attributes:
        ledger: where every step is written down.
        dataset: rows there are, ``None`` for as many as are wanted.
    """

    ledger: Ledger
    dataset: int | None

    def begin(self, *, keeps_state: bool = False) -> None:
        """Note that a trial begins, for finders that run the steps themselves."""

    def run(self, size: int) -> None:
        """Run a trial of three training steps: what is given to finders that want a function."""

    def module(self) -> nn.Module:
        """Return the user's model; called with ``rows(n)`` it gives ``{"loss": …}``."""

    def rows(self, size: int) -> Tensor:
        """Return what stands for a batch of ``size`` rows."""

    def optimizer(self, module: nn.Module) -> Any:
        """Return a new optimizer of the user's kind."""

    def speaking(self) -> Any:
        """Return a context in which running out of memory reads as CUDA's error."""

    def own_way(self, *, expecting: bool = False) -> int:
        """Return autobatch's answer, by ``find`` or what is behind it, told beforehand what to expect or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finder:
    """One finder with one set of options.

    Attributes:
        name: of the row.
        package: distribution whose version is noted; empty for what is here.
        call: returns the answer for a piece of work and a scratch folder.
        options: what differs from its defaults, and what had to be chosen because it has none.
        given: ``"model"`` or ``"function"``.
        shipped: whether this is the finder with its defaults, where it also comes with margin and limits out of the way.
        reads: whether it looks at the device's memory.
        needs_readings: whether it is not there to go by errors alone.
        on: the kinds of work it is run on: ``"simulated"``, ``"real"``.
        module: what must be importable.
        models: how many of the models it is run on, ``None`` for all of them.
    """

    name: str
    call: Callable[[Work, Path], int | None]
    package: str = ""
    options: str = ""
    given: str = "function"
    shipped: bool = False
    reads: bool = False
    needs_readings: bool = False
    on: tuple[str, ...] = ("simulated", "real")
    module: str = ""
    models: int | None = None


def load(module: str) -> Any:
    """Return a peer's module, without types: peers have none, and need not be installed to read this file."""
    return importlib.import_module(module)


def plain(fits: Callable[[int], bool], limit: int = LIMIT, tolerance: float = 0.01) -> int:
    """Return the largest size that fits by doubling and then bisecting to ``tolerance``: the reference, 0 where nothing fits."""
    best, wall, size = 0, limit + 1, 1
    while best < limit and best < (wall - 1) * (1 - tolerance):
        if fits(size):
            best = size
        else:
            wall = size
        size = min(2 * best, limit) if wall > limit else (best + wall) // 2
        if best == 0 and wall == 1:
            break
    return best


def _plain(work: Work, _: Path) -> int:
    import torch

    def fits(size: int) -> bool:
        try:
            work.run(size)
        except torch.OutOfMemoryError:
            return False
        return True

    return plain(fits, work.dataset or LIMIT)


def _autobatch(work: Work, _: Path, *, expecting: bool = False) -> int:
    try:
        return work.own_way(expecting=expecting)
    except NoBatchSizeFits:
        return 0


def _autobatch_here(work: Any, _: Path) -> int:
    try:
        return int(work.own_way(isolate=False))
    except NoBatchSizeFits:
        return 0


def _autobatch_search(work: Work, _: Path) -> int:
    import autobatch

    try:
        return autobatch.search(work.run, max_batch_size=work.dataset)
    except NoBatchSizeFits:
        return 0


OURS = (
    Finder(name="autobatch", call=_autobatch, options="margin=0", given="model", reads=True, needs_readings=True),
    Finder(
        name="autobatch, in this process",
        call=_autobatch_here,
        options="margin=0, isolate=False",
        given="model",
        reads=True,
        needs_readings=True,
        on=("real",),
    ),
    Finder(
        name="autobatch, foreseeing",
        call=functools.partial(_autobatch, expecting=True),
        options="margin=0; begins where a simulation that is off by up to 10 % expects the answer, as on a card",
        given="model",
        reads=True,
        needs_readings=True,
        on=("simulated",),
    ),
    Finder(name="autobatch.search", call=_autobatch_search, options="by errors alone", on=("simulated",)),
    Finder(name="plain reference", call=_plain, options="doubling, then bisection to 1 %; knows the data set's size"),
)


def finders() -> tuple[Finder, ...]:
    """Return all finders, ours first."""
    from benchmarks.peers.peer_finders import PEERS

    return (*OURS, *PEERS)


def by_name(name: str) -> Finder:
    """Return the finder called ``name``."""
    return next(finder for finder in finders() if finder.name == name)
