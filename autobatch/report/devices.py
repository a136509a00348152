"""Devices and their memory as lines of text."""

from __future__ import annotations

from dataclasses import dataclass

from autobatch.core.records import MemoryReading
from autobatch.core.units import format_bytes
from autobatch.report.lines import plain


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReport:
    """One device as ``autobatch devices`` shows it.

    Attributes:
        name: torch's name of it.
        description: what it is.
        reading: its memory, ``None`` when it could not be read.
        budget: bytes a training step could use now.
        cap: bytes a trial could use: the budget less the margin.
        notes: what limits the figures, or why there are none.
    """

    name: str
    description: str
    reading: MemoryReading | None = None
    budget: int | None = None
    cap: int | None = None
    notes: tuple[str, ...] = ()


def device_lines(report: DeviceReport) -> list[str]:
    """Return the device, what others hold, the budget and why, one fact a line."""
    lines = [f"{report.name}  {plain(report.description)}"]
    reading = report.reading
    if reading is not None:
        lines.append(f"  capacity  {format_bytes(reading.capacity)}")
        lines.append(f"  free      {format_bytes(reading.free)} (read from {reading.source})")
        for other in reading.others:
            used = "an amount the driver does not tell" if other.used is None else format_bytes(other.used)
            lines.append(f"  held      {used} by {plain(other.name) or 'a process'} (pid {other.pid})")
    if report.budget is not None and report.cap is not None:
        kept = format_bytes(report.budget - report.cap)
        lines.append(f"  budget    {format_bytes(report.budget)}: a trial may use {format_bytes(report.cap)}, {kept} stay free as margin")
    return [*lines, *(f"  note      {plain(note)}" for note in report.notes)]
