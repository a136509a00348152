"""The command line: one file a command, and the only place that prints or exits."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

import click

from autobatch._version import __version__
from autobatch.cli.devices import devices
from autobatch.cli.estimate import estimate
from autobatch.cli.probe import probe
from autobatch.core.errors import AutobatchError, WorkerFailed, WorkloadFailed
from autobatch.report.lines import plain


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
        error.show()
        sys.exit(error.exit_code)
    sys.exit(code)  # what click was told to exit with, None for a command that ran through


def _explain(error: AutobatchError) -> None:
    """Print the error, after the traceback or the last words that belong to it."""
    if isinstance(error, WorkloadFailed) and error.traceback_text:
        click.echo(error.traceback_text.rstrip(), err=True)
        where = "" if error.batch_size is None else f" at batch size {error.batch_size}"
        click.echo(f"autobatch: the workload failed{where}, for reasons of its own (not memory); its traceback is above.", err=True)
        return
    click.echo(f"autobatch: {plain(str(error))}", err=True)
    if isinstance(error, WorkerFailed) and error.stderr_tail:
        click.echo("The worker's last words:", err=True)
        for line in error.stderr_tail.splitlines():
            click.echo(f"  {plain(line)}", err=True)
