"""Numbers to text and back: the only place that divides by 1024."""

from __future__ import annotations

import math
import re

from autobatch.core.errors import InvalidRequest

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

_UNITS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB, "k": KIB, "m": MIB, "g": GIB, "t": TIB}
_DECIMAL = {"kb": "KiB", "mb": "MiB", "gb": "GiB", "tb": "TiB"}
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*)\s*")


def format_bytes(count: int | float) -> str:
    """Return ``count`` bytes as text with a binary unit: ``"1.50 GiB"``, ``"350 MiB"``, ``"12 B"``."""
    size = abs(count)
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            value = count / unit
            return f"{value:.2f} {name}" if unit >= GIB else f"{value:.1f} {name}"
    return f"{count:.0f} B"


def parse_bytes(text: str) -> int:
    """Return the bytes named by ``text``: ``"20GiB"``, ``"512 MiB"``, ``"1.5g"`` or a plain count of bytes.

    Raises:
        InvalidRequest: the text is not an amount of memory, is not above zero, or uses the ambiguous ``GB``.
    """
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"{text!r} is not an amount of memory. Write bytes or a binary unit, for example 20GiB or 512MiB.")
    number, unit = match.group(1), match.group(2).lower()
    if unit in _DECIMAL:
        raise InvalidRequest(
            f"{text!r} is ambiguous: {match.group(2)} is read as 1000 by some and as 1024 by others. "
            f"Write {number}{_DECIMAL[unit]} (powers of 1024)."
        )
    if unit not in _UNITS:
        raise InvalidRequest(f"{text!r} has an unknown unit {match.group(2)!r}. Known: KiB, MiB, GiB, TiB.")
    size = float(number) * _UNITS[unit]
    if not math.isfinite(size):
        raise InvalidRequest(f"{text[:20]}… is more memory than can be counted. Give an amount such as 20GiB.")
    count = math.floor(size)
    if count <= 0:
        raise InvalidRequest(f"{text!r} is no memory at all. Give an amount above zero, for example 20GiB.")
    return count


def format_count(count: int) -> str:
    """Return ``count`` with thousands separated: ``"12,288"``."""
    return f"{count:,}"


def counted(number: int, noun: str) -> str:
    """Return ``number`` of ``noun``: ``"1 row"``, ``"1,437 rows"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def divide_up(dividend: int, divisor: int) -> int:
    """Return ``dividend / divisor``, rounded up."""
    return -(-dividend // divisor)
