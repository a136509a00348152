"""The one way lines get to a terminal: with every control character of what they quote escaped."""

from __future__ import annotations

import click

from autobatch.core.text import plain


def say(line: str, *, err: bool = False) -> None:
    """Print one line of text, tabs as spaces and anything else that a terminal would obey as ``\\x1b``."""
    click.echo(plain(line.expandtabs()), err=err)
