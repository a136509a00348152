"""The command line: one file a command, and the only place that prints or exits."""

from __future__ import annotations

import io
import signal
import sys
from typing import NoReturn

import click

from autobatch._version import __version__
from autobatch.cli.cache import cache
from autobatch.cli.devices import devices
from autobatch.cli.estimate import estimate
from autobatch.cli.explain import explain
from autobatch.cli.probe import probe
from autobatch.cli.say import say
from autobatch.core.errors import AutobatchError, WorkerFailed, WorkloadFailed


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="autobatch")
def group() -> None:
    """Find the largest batch size that provably fits, by running it.

    \b
    Exit codes: 0 a plan, 2 usage, 3 no such device, 4 nothing fits, 5 the workload failed,
    6 the worker died or timed out, 130 interrupted.
    """


group.add_command(probe)
group.add_command(devices)
group.add_command(estimate)
group.add_command(explain)
group.add_command(cache)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command and exit with its code."""
    try:
        code = group.main(args=arguments, prog_name="autobatch", standalone_mode=False)
    except AutobatchError as error:
        _explain(error)
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        sys.exit(128 + signal.SIGINT)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(file=shown)
        for line in shown.getvalue().splitlines():
            say(line, err=True)
        sys.exit(error.exit_code)
    sys.exit(code)  # what click was told to exit with, None for a command that ran through


def _explain(error: AutobatchError) -> None:
    """Print the error, after the traceback or the last words that belong to it."""
    if isinstance(error, WorkloadFailed) and error.traceback_text:
        for line in error.traceback_text.rstrip().splitlines():
            say(line, err=True)
        where = "" if error.batch_size is None else f" at batch size {error.batch_size}"
        say(f"autobatch: the workload failed{where}, for reasons of its own (not memory); its traceback is above.", err=True)
        return
    say(f"autobatch: {error}", err=True)
    if isinstance(error, WorkerFailed) and error.stderr_tail:
        say("The worker's last words:", err=True)
        for line in error.stderr_tail.splitlines():
            say(f"  {line}", err=True)
