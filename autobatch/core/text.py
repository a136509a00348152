"""Text from elsewhere, made safe to show."""

from __future__ import annotations


def plain(text: str) -> str:
    """Return ``text`` on one line with every control character escaped, safe to show on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
