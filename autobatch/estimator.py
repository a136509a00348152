"""``estimate``: the same question as ``find``, for cards that are not here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from autobatch.core.errors import NoBatchSizeFits, WorkloadFailed
from autobatch.core.options import PlanRequest, SearchOptions
from autobatch.core.plan import BatchPlan
from autobatch.core.units import format_bytes, parse_bytes
from autobatch.loop import Run
from autobatch.simulate.cards import Card, find_card, known_cards

_STEP = ("loss_fn", "optimizer", "step", "make_batch", "mode", "precision")


def estimate(model: Any, sample: Any = None, *, gpu: str | int | Sequence[str | int], **options: Any) -> Any:
    """Return the plan that ``find`` would come to on a card that is not here, by simulation; a list for several cards.

    The step runs on fake tensors, without memory and without arithmetic, as it would run on CUDA; its storages are replayed in a model of
    the caching allocator under the card's memory. The plan is marked ``evidence="simulated"`` and carries an interval, ``low`` to ``high``.

    Args:
        model: the module to train; it is not touched.
        sample: a batch as the training loop gets it, a ``Dataset`` or a ``DataLoader``.
        gpu: a card's name, bytes (``"24GiB"``), or a list of them.
        options: ``find``'s arguments, less ``device``, ``isolate``, ``probe_timeout`` and ``progress``; and ``context``, the bytes that the
            process takes beside its tensors (what nvidia-smi shows for it less ``torch.cuda.memory_reserved()``), by default an assumption.

    Raises:
        InvalidRequest: there is no such card, or an argument cannot be meant.
        NoBatchSizeFits: the smallest permitted size fits none of the cards; where it fits some, it stands in the list for the others.
        WorkloadFailed: the step raised.
    """
    from autobatch.workload.workload import build_workload

    work = build_workload(model, sample, **{key: options.pop(key) for key in _STEP if key in options})
    names: Sequence[str | int] = [gpu] if isinstance(gpu, (str, int)) else gpu
    plans = estimate_workload(work, [find_card(name if isinstance(name, str) else f"{name}b") for name in names], {}, options)
    if all(isinstance(plan, NoBatchSizeFits) for plan in plans):
        raise plans[0]  # type: ignore[misc]
    return plans[0] if isinstance(gpu, (str, int)) else plans


def estimate_workload(
    work: Any, cards: Sequence[Card], defaults: Mapping[str, Any], options: Mapping[str, Any]
) -> list[BatchPlan | NoBatchSizeFits]:
    """Return for each card a plan, or why none fits; the cards share traces and what was replayed of them."""
    answers: list[BatchPlan | NoBatchSizeFits] = []
    for card in cards:
        try:
            answers.append(_plan(work, card, defaults, options))
        except NoBatchSizeFits as error:
            answers.append(error)
    return answers


def _plan(
    work: Any,
    card: Card,
    defaults: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    checkpointed: bool = False,
    expandable: bool = False,
) -> BatchPlan:
    from autobatch.simulate.allocator_settings import AllocatorSettings
    from autobatch.simulate.prober import SimulatedProber
    from autobatch.simulate.step import trace_for

    search = SearchOptions(**{key: options[key] for key in SearchOptions.__dataclass_fields__ if key in options})
    request = PlanRequest(**{key: options[key] for key in PlanRequest.__dataclass_fields__ if key in options})
    where = {key: options[key] for key in ("memory_budget", "margin") if key in options}
    unknown = set(options) - {*SearchOptions.__dataclass_fields__, *PlanRequest.__dataclass_fields__, "memory_budget", "margin", "context"}
    if unknown:
        raise TypeError(f"estimate() got unexpected arguments: {', '.join(sorted(unknown))}")
    settings = AllocatorSettings.from_environment(os.environ)
    if expandable:
        settings = dataclasses.replace(settings, expandable_segments=True)
    step = trace_for(work, card.capability, checkpointed=checkpointed)
    given = options.get("context")
    context = card.context + step.kernels if given is None else parse_bytes(str(given))
    prober = SimulatedProber(work, step.trace, card, settings=settings, notes=step.notes, context=context, **where, **step.shared)
    prober.setting = dataclasses.replace(prober.setting, defaults=dict(defaults))
    try:
        return _with_interval(Run(prober, request, search).plan(), prober, step.uncertainty)
    except NoBatchSizeFits as error:
        raise _too_small(error, prober, card) from None


def _too_small(error: NoBatchSizeFits, prober: Any, card: Card) -> NoBatchSizeFits:
    """Return the error with what the smallest size needs, and the smallest card of the table that has it."""
    needed = int(prober.needed(error.batch_size) / (1 - prober.setting.margin)) + card.total - prober.setting.reading.free
    would_do = min((other for other in known_cards() if other.total >= needed), key=lambda other: other.total, default=None)
    advice = f"{would_do.description} would do: --gpu {would_do.name}." if would_do else "No card of the table has that much."
    missing = f"Batch size {error.batch_size} needs {format_bytes(needed)} with context and margin; {card.description} has"
    return NoBatchSizeFits(
        f"{error} {missing} {format_bytes(card.total)}. {advice}",
        batch_size=error.batch_size,
        needed=needed,
        available=error.available,
    )


def _with_interval(plan: BatchPlan, prober: Any, uncertainty: float) -> BatchPlan:
    """Return the plan with the sizes that would be the answer if the step needed so much more, or so much less."""
    rows = -(-prober.rows_within(int(plan.cap * uncertainty * 1000), plan.best) // 1000)
    spare = plan.headroom - (plan.budget - plan.cap) if plan.limited_by != "memory" and plan.headroom is not None else 0
    unused = prober.rows_within(max(0, spare), plan.best)  # what limits the batch before memory does
    return dataclasses.replace(
        plan,
        low=max(1, plan.batch_size - max(0, rows - unused)),
        high=plan.batch_size + rows if plan.limited_by == "memory" else plan.batch_size,
    )


def explain(work: Any, card: Card, plan: BatchPlan, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return where the bytes are at the plan's peak, and the batch size that each change would give, every one simulated again."""
    from autobatch.simulate.breakdown import breakdown
    from autobatch.simulate.step import trace_for
    from autobatch.simulate.what_if import changes

    step = trace_for(work, card.capability)
    found = breakdown(step.trace, plan.batch_size)
    given = options.get("context")
    context = card.context + step.kernels if given is None else parse_bytes(str(given))
    outcomes: dict[str, int | str] = {}
    unlimited = dataclasses.replace(work, dataset_size=None)
    for change in changes(unlimited):
        how = {"checkpointed": change.checkpointed, "expandable": change.expandable}
        try:
            outcomes[change.name] = _plan(change.work, card, {}, options, **how).batch_size
        except (NoBatchSizeFits, WorkloadFailed) as error:
            outcomes[change.name] = str(error)
    return {
        "phase": found.phase,
        "by_tag": found.by_tag,
        "by_module": found.by_module,
        "workspace": card.workspace,
        "context": context,
        "by_memory": plan.batch_size if plan.limited_by == "memory" else _plan(unlimited, card, {}, options).batch_size,
        "what_if": outcomes,
    }


def estimate_target(
    target: str, gpus: Sequence[str], overrides: Mapping[str, Any], options: Mapping[str, Any], *, explained: bool = False
) -> list[tuple[BatchPlan | NoBatchSizeFits, dict[str, Any] | None]]:
    """Return for each card a plan, or why none fits, of the training step that ``target`` names, explained where that is wanted.

    Its tensors are never made where that can be avoided.
    """
    from autobatch.simulate.loading import load_without_memory

    cards = [find_card(name) for name in gpus]
    work, defaults = load_without_memory(target, overrides)
    answers = estimate_workload(work, cards, defaults, options)
    return [
        (answer, explain(work, card, answer, options) if explained and isinstance(answer, BatchPlan) else None)
        for answer, card in zip(answers, cards, strict=True)
    ]
