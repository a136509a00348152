"""``autobatch devices``: what is here, what others hold, and the budget autobatch would use."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import click

from autobatch.cli.say import say
from autobatch.core.errors import DeviceUnavailable
from autobatch.report.devices import DeviceReport, device_lines


@click.command()
@click.option("--memory-budget", metavar="AMOUNT", help="Show the budget narrowed to this: 20GiB, bytes, or a fraction such as 0.5.")
@click.option("--margin", type=float, default=0.05, show_default=True, help="Fraction of the budget kept free in every trial.")
@click.option("--json", "as_json", is_flag=True, help="Print a list with all readings.")
def devices(memory_budget: str | None, margin: float, as_json: bool) -> None:
    """Show the devices here: capacity, what others hold, the budget and why."""
    reports = list(_reports(memory_budget, margin))
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(report) for report in reports], indent=2))
        return
    for report in reports:
        for line in device_lines(report):
            say(line)


def _reports(memory_budget: str | None, margin: float) -> Iterator[DeviceReport]:
    from autobatch.devices import device_names

    for name in device_names():
        try:
            yield _report(name, memory_budget, margin)
        except DeviceUnavailable as error:
            yield DeviceReport(name=name, description="not usable", notes=(str(error),))


def _report(name: str, memory_budget: str | None, margin: float) -> DeviceReport:
    from autobatch.devices import open_device
    from autobatch.devices.base import set_budget

    device = open_device(name)
    reading = device.memory()
    budget, cap, notes = set_budget(reading, memory_budget, margin)
    return DeviceReport(name=name, description=device.description, reading=reading, budget=budget, cap=cap, notes=(*reading.notes, *notes))
