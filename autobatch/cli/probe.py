"""``autobatch probe``: measure on this machine, in a worker process."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from autobatch.cli.progress import Display
from autobatch.cli.say import say
from autobatch.core.learning_rate import RULES
from autobatch.core.options import FAST_ENOUGH, PlanRequest, SearchOptions
from autobatch.core.plan import BatchPlan
from autobatch.report.lines import answer_line, args_line, env_lines, plan_lines

_STEP = ("precision", "mode", "optimizer", "base_lr")


@click.command()
@click.argument("target")
@click.option("--device", help="cuda, cuda:N or cpu; by default the current GPU, else the CPU.")
@click.option(
    "--memory-budget",
    metavar="AMOUNT",
    help="20GiB, bytes, or a fraction of the device such as 0.5; by default all that is free.",
)
@click.option("--margin", type=float, default=0.05, show_default=True, help="Fraction of the budget kept free in every trial.")
@click.option("--min-batch-size", type=int, default=1, show_default=True)
@click.option("--max-batch-size", type=int, help="By default 1,048,576, or the data set's size.")
@click.option("--multiple-of", type=int, default=1, show_default=True, help="Return a multiple of this.")
@click.option("--tolerance", type=float, default=0.01, show_default=True, help="Stop this close to the true maximum; 0 for exact.")
@click.option(
    "--steps",
    type=int,
    default=3,
    show_default=True,
    help="Training steps of the trial that confirms; the others run one less, and 2 at the least.",
)
@click.option("--time-limit", type=float, metavar="SECONDS", help="For the whole search; the best size proven by then is returned.")
@click.option("--probe-timeout", type=float, default=600.0, show_default=True, metavar="SECONDS", help="For one probe.")
@click.option("--objective", type=click.Choice(["memory", "throughput"]), default="memory", show_default=True)
@click.option("--fast-enough", type=float, default=FAST_ENOUGH, show_default=True, help="Share of the best samples/s for throughput.")
@click.option("--mode", type=click.Choice(["train", "eval"]), help="eval: forward passes without gradients.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Autocast; fp16 with a gradient scaler.")
@click.option("--optimizer", metavar="NAME", help="One of torch.optim by name (sgd, adamw, …) or none, in place of the target's.")
@click.option("--base-lr", type=float, help="Learning rate tuned at --base-batch-size; by default the optimizer's.")
@click.option("--base-batch-size", type=int, default=256, show_default=True)
@click.option("--lr-rule", type=click.Choice([*RULES, "auto"]), default="linear", show_default=True)
@click.option("--noise-scale", type=float, metavar="ROWS", help="Gradient noise scale, for the rules that need it.")
@click.option("--global-batch-size", type=int, help="Rows one optimizer step should see; gives the accumulation steps.")
@click.option("--dataset-size", type=int, help="Rows in the data set; by default the target's.")
@click.option("--epochs", type=int, help="Passes over the data set.")
@click.option(
    "--cache/--no-cache",
    default=False,
    show_default=True,
    help="Keep the plan, and show it again while TARGET's files, the options, the device and the versions are the same. Files that it "
    "only reads (data, settings) and what changes inside installed packages of one version are not noticed.",
)
@click.option("--drop-last", is_flag=True, help="Leave out a last batch that is not full.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole plan as JSON.")
@click.option("--format", "form", type=click.Choice(["text", "args", "env"]), default="text", show_default=True)
def probe(target: str, as_json: bool, form: str, **options: Any) -> None:
    """Measure the largest batch size of TARGET's training step on this machine.

    \b
    TARGET is code that you choose to run:
      path/to/train.py:build      a function returning a Workload, a (model, sample) pair
      package.module:build        or a dict of find's arguments
      timm:resnet50  torchvision:resnet50  hf:gpt2   random weights, nothing is downloaded
      example:gpt  example:digits                    come with autobatch

    The trials run in a worker process. Progress goes to standard error, the answer to standard output.
    """
    plan = _search(target, options)
    for line in plan_lines(plan):
        say(line, err=True)
    if as_json:
        click.echo(plan.to_json())
    elif form == "text":
        say(answer_line(plan))
    else:
        for line in [args_line(plan)] if form == "args" else env_lines(plan):
            say(line)


def _search(target: str, options: dict[str, Any]) -> BatchPlan:
    """Return the plan for ``target``, its progress shown while it is found."""
    from autobatch.cache.recall import question_of_target, recall
    from autobatch.cache.store import PlanCache
    from autobatch.loop import Run
    from autobatch.probe.worker import WorkerProber

    keep = options.pop("cache")
    search = SearchOptions(**{key: options[key] for key in SearchOptions.__dataclass_fields__})
    request = PlanRequest(**{key: options[key] for key in PlanRequest.__dataclass_fields__ if key in options})
    where = {
        "device": options["device"],
        "memory_budget": options["memory_budget"],
        "margin": options["margin"],
        **{key: options[key] for key in _STEP},
    }
    with Display(sys.stderr) as display:

        def measure() -> BatchPlan:
            # What the user's code prints must not mix with the answer on standard output.
            prober = WorkerProber(
                target=target,
                options=where,
                probe_timeout=options["probe_timeout"],
                time_limit=options["time_limit"],
                stdout=sys.stderr.fileno(),
                stderr=display.write,
            )
            with contextlib.closing(prober):
                return Run(prober, request, search, display).plan()

        display.loading(target)
        try:
            return recall(PlanCache(), question_of_target(target, options), measure) if keep else measure()
        except KeyboardInterrupt:
            display.interrupted()
            raise click.exceptions.Exit(130) from None
        except BaseException:
            display.failed()
            raise
