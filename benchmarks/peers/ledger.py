"""What a finder made the machine do, written down by the training step itself: no finder is asked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Trial:
    """One attempt of a finder at one batch size.

    Attributes:
        size: rows the finder asked for.
        rows: rows that were run, over all steps, the one that broke off included.
        begun: steps that were begun.
        done: steps that came to their end.
    """

    size: int
    rows: int = 0
    begun: int = 0
    done: int = 0

    @property
    def ran(self) -> bool:
        """Whether every step that was begun came to its end."""
        return 0 < self.begun == self.done


class Ledger:
    """The trials of one search, in order."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []
        self._opening = True

    def open(self) -> None:
        """Note that the next step belongs to a new trial."""
        self._opening = True

    def begin(self, size: int, rows: int) -> None:
        """Note that a step of ``rows`` rows begins, for which ``size`` were asked."""
        if self._opening or self.trials[-1].size != size:
            self.trials.append(Trial(size))
            self._opening = False
        self.trials[-1].rows += rows
        self.trials[-1].begun += 1

    def passes_done(self) -> None:
        """Note that the passes of the step under way have come to their end."""
        self.trials[-1].done = self.trials[-1].begun

    def optimizer_begins(self) -> None:
        """Note that the optimizer steps, which belongs to the step under way."""
        if self.trials:
            self.trials[-1].done = self.trials[-1].begun - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """How one search of one finder went.

    Attributes:
        work: case or model.
        answer: what it returned; 0 where it said that nothing fits, ``None`` where it broke or ran out of time.
        trials: attempts that began a step.
        out_of_memory: how many of them broke off.
        rows: rows run in all.
        ran: whether the answer is a size that was itself run and came to its end.
        seconds: wall time.
        processor: processor time, of child processes that have ended too.
        changed: what the search left changed: ``"weights"``, ``"buffers"``, ``"random state"``, …; ``None`` where the finder was given a
            function and not a model, so that it is the function's doing.
        left: bytes left behind in this process, ``None`` where that was not looked at.
        error: why there is no answer.
    """

    work: str
    answer: int | None
    trials: int = 0
    out_of_memory: int = 0
    rows: int = 0
    ran: bool = False
    seconds: float | None = None
    processor: float | None = None
    changed: list[str] | None = None
    left: int | None = None
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the record as JSON has it."""
        return asdict(self)


def summed_up(work: str, answer: int | None, trials: list[Trial], **more: Any) -> Search:
    """Return the search of ``work`` that made these ``trials``."""
    return Search(
        work=work,
        answer=answer,
        trials=len(trials),
        out_of_memory=sum(not trial.ran for trial in trials),
        rows=sum(trial.rows for trial in trials),
        ran=answer == 0 or any(trial.size == answer and trial.ran for trial in trials),
        **more,
    )
