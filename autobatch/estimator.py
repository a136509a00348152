"""``estimate``: the same question as ``find``, for cards that are not here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from autobatch.core.errors import NoBatchSizeFits, WorkloadFailed
from autobatch.core.options import PlanRequest, SearchOptions
from autobatch.core.plan import BatchPlan
from autobatch.core.units import parse_bytes
from autobatch.loop import Run
from autobatch.simulate.cards import Card, find_card

_STEP = ("loss_fn", "optimizer", "step", "make_batch", "mode", "precision")


def estimate(model: Any, sample: Any = None, *, gpu: str | int | Sequence[str | int], **options: Any) -> Any:
    """Return the plan that ``find`` would come to on a card that is not here, by simulation; a list of them for several cards.

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
        NoBatchSizeFits: the smallest permitted size does not fit the card.
        WorkloadFailed: the step raised.
    """
    from autobatch.workload.workload import build_workload

    work = build_workload(model, sample, **{key: options.pop(key) for key in _STEP if key in options})
    several = not isinstance(gpu, (str, int))
    names: Sequence[str | int] = gpu if several else [gpu]  # type: ignore[assignment, list-item]
    plans = estimate_workload(work, [find_card(str(name) if isinstance(name, str) else f"{name}b") for name in names], {}, options)
    return plans if several else plans[0]


def estimate_workload(work: Any, cards: Sequence[Card], defaults: Mapping[str, Any], options: Mapping[str, Any]) -> list[BatchPlan]:
    """Return a plan for each card; cards of one compute capability share a trace."""
    return [_plan(work, card, defaults, options) for card in cards]


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
    return _with_interval(Run(prober, request, search).plan(), prober, step.uncertainty)


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
    from autobatch.simulate.step import repeated_blocks, trace_for

    found = breakdown(trace_for(work, card.capability).trace, plan.batch_size)
    changes: dict[str, tuple[Any, dict[str, Any]]] = {}
    if work.precision not in ("bf16", "fp16"):
        changes["bf16 autocast"] = dataclasses.replace(work, precision="bf16"), {}
    if repeated_blocks(work.model):
        changes["activation checkpointing of its blocks"] = work, {"checkpointed": True}
    if work.optimizer is not None and type(work.optimizer).__name__ != "SGD":
        parameters = [p for p in work.model.parameters() if p.requires_grad]
        changes["SGD without momentum"] = dataclasses.replace(work, optimizer=_sgd(parameters)), {}
    changes["expandable segments"] = work, {"expandable": True}
    outcomes: dict[str, int | str] = {}
    for name, (changed, how) in changes.items():
        try:
            outcomes[name] = _plan(dataclasses.replace(changed, dataset_size=None), card, {}, options, **how).batch_size
        except (NoBatchSizeFits, WorkloadFailed) as error:
            outcomes[name] = str(error)
    return {
        "phase": found.phase,
        "by_tag": found.by_tag,
        "by_module": found.by_module,
        "workspace": card.workspace,
        "context": card.context,
        "what_if": outcomes,
    }


def _sgd(parameters: list[Any]) -> Any:
    import torch

    return torch.optim.SGD(parameters, lr=1e-3)


def estimate_target(
    target: str, gpus: Sequence[str], overrides: Mapping[str, Any], options: Mapping[str, Any], *, explained: bool = False
) -> list[tuple[BatchPlan, dict[str, Any] | None]]:
    """Return a plan for each card and the training step that ``target`` names, explained where that is wanted.

    Its tensors are never made where that can be avoided.
    """
    from autobatch.simulate.loading import load_without_memory

    cards = [find_card(name) for name in gpus]
    work, defaults = load_without_memory(target, overrides)
    plans = estimate_workload(work, cards, defaults, options)
    return [(plan, explain(work, card, plan, options) if explained else None) for plan, card in zip(plans, cards, strict=True)]
