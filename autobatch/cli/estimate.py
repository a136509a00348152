"""``autobatch estimate``: the same question for cards that are not here."""

from __future__ import annotations

import json
from typing import Any

import click

from autobatch.cli.say import say
from autobatch.core.errors import InvalidRequest, NoBatchSizeFits
from autobatch.core.learning_rate import RULES
from autobatch.core.plan import BatchPlan
from autobatch.report.estimates import estimate_lines, explained_lines
from autobatch.report.lines import plan_lines
from autobatch.simulate.cards import known_cards

_STEP = ("precision", "mode", "optimizer", "base_lr")


@click.command()
@click.argument("target")
@click.option(
    "--gpu", "gpus", multiple=True, metavar="CARD", help="A card's name (rtx4090, a100-80gb) or an amount (24GiB); may be repeated."
)
@click.option("--all-gpus", is_flag=True, help="Every card of the table.")
@click.option("--memory-budget", metavar="AMOUNT", help="20GiB, bytes, or a fraction of the card; by default all that the context leaves.")
@click.option("--context", metavar="AMOUNT", help="What the process takes beside its tensors; by default about 500 MiB, an assumption.")
@click.option("--margin", type=float, default=0.05, show_default=True, help="Fraction of the budget kept free.")
@click.option("--min-batch-size", type=int, default=1, show_default=True)
@click.option("--max-batch-size", type=int, help="By default 1,048,576, or the data set's size.")
@click.option("--multiple-of", type=int, default=1, show_default=True, help="Return a multiple of this.")
@click.option("--tolerance", type=float, default=0.01, show_default=True, help="Stop this close to the true maximum; 0 for exact.")
@click.option("--mode", type=click.Choice(["train", "eval"]), help="eval: forward passes without gradients.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Autocast as on CUDA.")
@click.option("--optimizer", metavar="NAME", help="One of torch.optim by name (sgd, adamw, …) or none, in place of the target's.")
@click.option("--base-lr", type=float, help="Learning rate tuned at --base-batch-size; by default the optimizer's.")
@click.option("--base-batch-size", type=int, default=256, show_default=True)
@click.option("--lr-rule", type=click.Choice([*RULES, "auto"]), default="linear", show_default=True)
@click.option("--noise-scale", type=float, metavar="ROWS", help="Gradient noise scale, for the rules that need it.")
@click.option("--global-batch-size", type=int, help="Rows one optimizer step should see; gives the accumulation steps.")
@click.option("--dataset-size", type=int, help="Rows in the data set; by default the target's.")
@click.option("--epochs", type=int, help="Passes over the data set.")
@click.option("--drop-last", is_flag=True, help="Leave out a last batch that is not full.")
@click.option("--explain", is_flag=True, help="Show where the bytes are at the peak, and what would change the batch size.")
@click.option("--json", "as_json", is_flag=True, help="Print a list with the plan for each card.")
def estimate(target: str, gpus: tuple[str, ...], all_gpus: bool, explain: bool, as_json: bool, **options: Any) -> None:
    """Estimate the largest batch size of TARGET's training step on cards that are not here.

    TARGET is code that you choose to run, as for autobatch probe. Its step is traced on tensors without memory, in processes apart, and
    replayed in a model of the caching allocator. What it prints is shown once; what it saves is saved. The answer is a table with an
    interval for each card; nothing was run on a card.
    """
    from autobatch.estimator import estimate_target

    names = [card.name for card in known_cards()] if all_gpus else list(gpus)
    if not names:
        raise InvalidRequest("Which card? Give --gpu rtx4090, --gpu 24GiB or --all-gpus.")
    overrides = {key: options.pop(key) for key in _STEP if key != "base_lr"} | {"base_lr": options["base_lr"]}
    say(f"tracing {target}: its step runs on tensors without memory; what it saves is saved", err=True)
    answers = estimate_target(target, names, overrides, options, explained=explain)
    if all(isinstance(answer, NoBatchSizeFits) for answer, _ in answers):
        raise answers[0][0]  # type: ignore[misc]
    if as_json:
        click.echo(json.dumps([_as_data(name, answer, why) for name, (answer, why) in zip(names, answers, strict=True)], indent=2))
        return
    if len(answers) == 1:
        for line in plan_lines(answers[0][0]):  # type: ignore[arg-type]
            say(line, err=True)
    for line in estimate_lines([(name, answer) for name, (answer, _) in zip(names, answers, strict=True)]):
        say(line)
    for answer, why in answers:
        for line in explained_lines(answer, why) if isinstance(answer, BatchPlan) and why else []:
            say(line)


def _as_data(name: str, answer: BatchPlan | NoBatchSizeFits, why: dict[str, Any] | None) -> dict[str, Any]:
    if isinstance(answer, NoBatchSizeFits):
        return {"device": name, "batch_size": None, "error": str(answer), "needed": answer.needed}
    return answer.to_dict() | ({"explained": why} if why else {})
