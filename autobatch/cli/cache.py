"""``autobatch cache``: the plans that were kept."""

from __future__ import annotations

import click

from autobatch.cache.store import Kept, PlanCache
from autobatch.cli.say import say
from autobatch.core.text import plain


@click.group()
def cache() -> None:
    """List or remove the plans kept by autobatch probe --cache and find(…, cache=True)."""


@cache.command("list")
def list_() -> None:
    """Show the plans that are kept, newest first; autobatch explain FILE shows one of them."""
    store = PlanCache()
    entries, ignored = store.entries()
    for line in _table(entries):
        say(line)
    if not entries:
        say(f"No plans are kept in {store.folder}.")
    if ignored:
        say(
            f"{ignored} that cannot be read or trusted {'is' if ignored == 1 else 'are'} ignored; autobatch cache clear removes them.",
            err=True,
        )


@cache.command()
def clear() -> None:
    """Remove the plans that are kept."""
    store = PlanCache()
    removed, failed = store.clear()
    say(f"Removed {removed} {'plan' if removed == 1 else 'plans'} from {store.folder}.")
    if failed:
        say(f"{failed} could not be removed: look at the permissions of that folder.", err=True)
        raise click.exceptions.Exit(1)


def _table(entries: list[Kept]) -> list[str]:
    """Return one line a plan: when it was measured, of what, where, the batch size and its file."""
    if not entries:
        return []
    rows = [("measured", "what", "device", "batch size", "file")]
    for one in entries:
        device = one.plan.device_description or one.plan.device
        rows.append((one.origin.when, plain(one.origin.what), plain(device), f"{one.plan.batch_size:,}", plain(str(one.path))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
