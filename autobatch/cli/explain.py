"""``autobatch explain``: a saved plan as text."""

from __future__ import annotations

from typing import TextIO

import click

from autobatch.cli.say import say
from autobatch.core.errors import InvalidRequest
from autobatch.core.plan import BatchPlan
from autobatch.report.lines import plan_lines, probe_line


@click.command()
@click.argument("file", type=click.File(encoding="utf-8"))
def explain(file: TextIO) -> None:
    """Show a plan that was saved: its trials, what they led to, and its notes.

    FILE is what autobatch probe --json or plan.to_json() wrote; - reads standard input.
    """
    try:
        text = file.read()
    except ValueError as error:
        raise InvalidRequest(f"{file.name} is not text in UTF-8 ({error}), so it is no plan.") from None
    plan = BatchPlan.from_json(text)
    for probe in plan.probes:
        say(probe_line(probe, plan.cap))
    for line in plan_lines(plan):
        say(line)
