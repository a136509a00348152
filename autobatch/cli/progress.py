"""What standard error shows while a search runs: one line a probe, and on a terminal the trial that is under way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.status import Status
from rich.text import Text

from autobatch.core.records import Probe, Setting, Trying
from autobatch.core.text import plain
from autobatch.report.lines import probe_line, setting_lines

# Colours of the user's program are shown. What moves the cursor or sets a title would garble the live line, so it is left out.
_COLOUR = re.compile(r"(\x1b\[[0-9;:]*m)")
_COMMAND = re.compile(r"\x1b\[(?![0-9;:]*m)[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)")


class Display:
    """Shows a search's progress on ``stream``: plain lines in a log, a live status on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._status: Status | None = None
        self._setting: Setting | None = None
        self._last: Trying | None = None
        self._best: int | None = None
        self._wall: int | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._quiet()

    def __call__(self, event: Setting | Trying | Probe) -> None:
        """Show one event of the search."""
        if isinstance(event, Setting):
            self._setting = event
            self._show(setting_lines(event))
        elif isinstance(event, Trying):
            self._last, self._best, self._wall = event, event.best, event.wall
            self._live(f"{'confirming' if event.confirmation else 'probing'} batch size {event.batch_size:,} ({self._bracket()})")
        else:
            self._quiet()
            self._learn(event)
            self._show([probe_line(event, self._setting.cap if self._setting else None)])

    def loading(self, target: str) -> None:
        """Say that the workload is being loaded."""
        self._live(f"loading {plain(target)}")

    def write(self, text: str) -> None:
        """Pass on what the worker wrote to its standard error."""
        for line in text.rstrip("\r\n").split("\n"):
            self._console.print(Text.from_ansi(_shown(line)))

    def interrupted(self) -> None:
        """Say what was known when the user stopped the search."""
        self._quiet()
        known = self._bracket() if self._last is not None else "no batch size had been tried"
        self._show([f"autobatch: interrupted; the worker was stopped. So far: {known}. Nothing was confirmed."])

    def failed(self) -> None:
        """Say what was known when the search broke off."""
        self._quiet()
        if self._best is not None:
            self._show([f"Known before that: {self._bracket()}."])

    def _live(self, text: str) -> None:
        if self._console.is_terminal:
            self._quiet()
            self._status = self._console.status(Text(text))
            self._status.start()

    def _quiet(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _show(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._console.print(Text(line))

    def _learn(self, probe: Probe) -> None:
        """Take in a result before it is shown: an interrupt right after it must not deny it."""
        if probe.outcome.fits:
            self._best = max(self._best or 0, probe.batch_size)
        else:
            self._wall = probe.batch_size if self._wall is None else min(self._wall, probe.batch_size)

    def _bracket(self) -> str:
        best = "nothing fitted yet" if self._best is None else f"{self._best:,} fits"
        return best if self._wall is None else f"{best}, {self._wall:,} does not"


def _shown(line: str) -> str:
    """Return a line as a terminal would show it at last, its colours kept and every other control character escaped."""
    parts = _COLOUR.split(_COMMAND.sub("", line.rpartition("\r")[2]).expandtabs())
    return "".join(part if _COLOUR.fullmatch(part) else plain(part) for part in parts)
