"""Everything that a changed batch size scales: learning rates by group, and what belongs to them, each with formula and source.

The formulas are functions of ``growth``, the global batch divided by the base batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch.core.learning_rate import BASE_BATCH_SIZE, LearningRate, check_rule, optimizer_family, scale
from autobatch.core.records import Setting
from autobatch.core.units import counted, divide_up

if TYPE_CHECKING:
    from autobatch.core.options import PlanRequest
    from autobatch.core.plan import BatchPlan

# Written into each parameter group beside its scaled learning rate, so that it is saved and loaded together with that.
MARK = "autobatch_lr_scale"
# Goyal et al. 2017 ramp the learning rate up over the first five epochs.
WARMUP_EPOCHS = 5
# An averaging factor that many training scripts have, to show what becomes of it.
_USUAL_EMA = 0.9999
# The SDE rule is derived for growth × (1 − beta) well below 1.
_SDE_LIMIT = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """One quantity, and what becomes of it at the plan's batch size.

    Attributes:
        name: ``"learning rate"``, ``"beta1"``, ``"beta2"``, ``"alpha"``, ``"eps"``, ``"weight decay"``, ``"warm-up steps"``,
            ``"EMA decay"`` or ``"BatchNorm momentum"``.
        group: index of the optimizer's parameter group it belongs to, ``None`` for one that belongs to none.
        before: its value at the base batch size.
        after: its value at the plan's, the same where it is meant to stay.
        formula: how the one comes from the other, with figures.
        source: where that was published.
        evidence_range: what it was shown for.
        caveat: what is known against it here, empty when there is nothing.
        written: by what it is written into the optimizer: ``"apply"``; ``"everything"``, apply with ``everything=True``; or
            ``"nothing"``, where it is the reader's to do.
    """

    name: str
    group: int | None = None
    before: float | None = None
    after: float | None = None
    formula: str
    source: str
    evidence_range: str = ""
    caveat: str = ""
    written: str = "nothing"


def half_life_decay(decay: float, growth: float) -> float:
    """Return the averaging factor ``decay ** growth``, which forgets as fast per sample as ``decay`` did at the base batch.

    For Adam's betas: Marek et al. 2025, arXiv 2507.07101. To first order the same as the SDE rule 1 − growth·(1 − beta) of Malladi et al.
    2022, arXiv 2205.10287, but never outside (0, 1). For averages of weights: Busbridge et al. 2023, arXiv 2307.13813.
    """
    return float(decay**growth)


def scaled_eps(eps: float, growth: float) -> float:
    """Return ``eps / √growth``, Adam's epsilon under the square root rule (Malladi et al. 2022, arXiv 2205.10287)."""
    return eps / math.sqrt(growth)


def timescale_weight_decay(weight_decay: float, growth: float, lr_scale: float) -> float:
    """Return the decoupled weight decay ``weight_decay · growth / lr_scale``, which averages over as many epochs as before.

    AdamW's weights are an average of its updates over 1 / (lr · weight_decay) steps; the best timescale in epochs hardly depends on the
    batch (Wang & Aitchison 2024, arXiv 2405.13698).
    """
    return weight_decay * growth / lr_scale


def batch_norm_momentum(momentum: float, batch_size: int, base_batch_size: int) -> float:
    """Return the momentum ``1 − (1 − momentum) ** (batch / base batch)``, both per device: running statistics cover as many rows."""
    return float(1 - (1 - momentum) ** (batch_size / base_batch_size))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRates:
    """The learning rates of a whole optimizer.

    Attributes:
        base_lr: learning rate the scaling started from, ``None`` when there is none.
        scaled: what became of it, ``None`` when there is none.
        base_lrs: learning rate of every parameter group that the scaling started from, in order; empty without an optimizer.
        lrs: what became of those.
        notes: what was assumed, and the caveats.
    """

    base_lr: float | None = None
    scaled: LearningRate | None = None
    base_lrs: tuple[float, ...] = ()
    lrs: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


def group_rates(setting: Setting, request: PlanRequest, global_batch: int) -> GroupRates:
    """Return the learning rates for ``global_batch`` rows a step: from ``request.base_lr``, else from the optimizer's own.

    ``base_lr`` is the rate of the first parameter group that has one above zero; the other groups keep their ratio to it.

    Raises:
        InvalidRequest: the rule is not known, lacks its noise scale, or gives a learning rate that is not a number above zero.
    """
    check_rule(request.lr_rule, request.noise_scale)
    groups = setting.group_lrs
    own = next((lr for lr in groups if lr > 0), None) if all(map(math.isfinite, groups)) else None
    base_lr = request.base_lr if request.base_lr is not None else own
    if base_lr is None:
        return GroupRates(notes=_no_rate(setting))
    base_batch, name = request.base_batch_size, setting.optimizer_name
    scaled = scale(request.lr_rule, float(base_lr), global_batch, base_batch, name, request.noise_scale)
    shares = () if own is None else tuple(lr / own for lr in groups)
    notes = []
    if request.base_lr is None and base_batch == BASE_BATCH_SIZE and scaled.scale != 1:
        notes.append(
            f"the optimizer's learning rate {base_lr:.6g} is taken to suit a global batch of {base_batch:,} rows; "
            "if it was tuned at another, pass base_batch_size="
        )
    if request.base_lr is not None and len(groups) > 1 and own is not None:
        notes.append(f"base_lr {base_lr:.6g} replaces the optimizer's {own:.6g}; its other parameter groups keep their ratio to that")
    return GroupRates(
        base_lr=float(base_lr),
        scaled=scaled,
        base_lrs=tuple(base_lr * share for share in shares),
        lrs=tuple(scaled.lr * share for share in shares),
        notes=(*notes, *scaled.caveats),
    )


def _no_rate(setting: Setting) -> tuple[str, ...]:
    if setting.mode != "train":
        return ()
    if setting.group_lrs:
        rates = ", ".join(f"{lr:g}" for lr in setting.group_lrs)
        return (f"no learning rate: the optimizer's own is {rates} (a schedule may have set it); pass base_lr=",)
    return ("no learning rate: pass base_lr= and base_batch_size=, the global batch size it was tuned at",)


def what_scales(plan: BatchPlan, setting: Setting, request: PlanRequest, rates: GroupRates) -> tuple[Scaled, ...]:
    """Return everything that scales with the plan's global batch, ``plan`` being whole but for this; empty without a learning rate."""
    scaled = rates.scaled
    if scaled is None:
        return ()
    rows = list(_learning_rates(rates, scaled))
    growth = plan.global_batch_size / plan.base_batch_size
    if growth == 1:
        return tuple(rows)
    for group, options in enumerate(setting.group_options):
        rows += _averages(options, group, growth, scaled.rule, setting.optimizer_name)
        rows += _weight_decay(options, group, growth, scaled.scale, setting.optimizer_name)
    rows += _warmup(plan)
    # Only who named the base knows that it was one; and only with one device was it a micro-batch.
    named = request.base_lr is not None or request.base_batch_size != BASE_BATCH_SIZE
    return (*rows, _ema(growth), *(_batch_norm(plan, setting) if named and plan.world_size == 1 else ()))


def _learning_rates(rates: GroupRates, scaled: LearningRate) -> Iterator[Scaled]:
    pairs = list(zip(rates.base_lrs, rates.lrs, strict=True)) or [(rates.base_lr or 0.0, scaled.lr)]
    for group, (before, after) in enumerate(pairs):
        yield Scaled(
            name="learning rate",
            group=group,
            before=before,
            after=after,
            formula=scaled.formula if before == rates.base_lr else f"{before:.6g} × {scaled.scale:.6g}",
            source=scaled.evidence,
            evidence_range=scaled.evidence_range,
            caveat="; ".join(scaled.caveats) if group == 0 else "",
            written="apply",
        )


def _averages(options: Mapping[str, float], group: int, growth: float, rule: str, optimizer_name: str) -> Iterator[Scaled]:
    """Yield what becomes of the running averages of an adaptive optimizer, and of eps."""
    if optimizer_family(optimizer_name) != "adaptive":
        return
    sde = rule == "sqrt"
    for name in ("beta1", "beta2", "alpha") if sde else ("beta2", "alpha"):
        beta = options.get(name)
        if beta is None or not 0 < beta < 1:
            continue
        caveats = [] if "adam" in optimizer_name.lower() else [f"shown for Adam, not for {optimizer_name}"]
        if sde and growth * (1 - beta) > _SDE_LIMIT:
            caveats.append(f"growth × (1 − {name}) = {growth * (1 - beta):.3g} is not small, as the SDE rule takes it to be")
        yield Scaled(
            name=name,
            group=group,
            before=beta,
            after=half_life_decay(beta, growth),
            formula=f"{beta:.6g}^{growth:.6g}",
            source="Marek et al. 2025, arXiv 2507.07101; to first order the SDE rule of Malladi et al. 2022, arXiv 2205.10287",
            evidence_range="512 sequences down to 1, GPT-2 of 124M parameters",
            caveat="; ".join(caveats),
            written="everything",
        )
    if sde and options.get("eps"):
        yield Scaled(
            name="eps",
            group=group,
            before=options["eps"],
            after=scaled_eps(options["eps"], growth),
            formula=f"{options['eps']:.6g} / √{growth:.6g}",
            source="Malladi et al. 2022, arXiv 2205.10287",
            evidence_range="growth × (1 − beta) well below 1",
            written="everything",
        )


def _weight_decay(options: Mapping[str, float], group: int, growth: float, lr_scale: float, optimizer_name: str) -> Iterator[Scaled]:
    decoupled, coupled = options.get("decoupled_weight_decay"), options.get("weight_decay")
    if decoupled:
        yield Scaled(
            name="weight decay",
            group=group,
            before=decoupled,
            after=timescale_weight_decay(decoupled, growth, lr_scale),
            formula=f"{decoupled:.6g} × {growth:.6g} / {lr_scale:.6g}",
            source="Wang & Aitchison 2024, arXiv 2405.13698",
            evidence_range="a timescale of 1 epoch up to all of them",
            written="everything",
        )
    elif coupled:
        sgd = optimizer_family(optimizer_name) == "sgd"
        yield Scaled(
            name="weight decay",
            group=group,
            before=coupled,
            after=coupled,
            formula="unchanged",
            source="Goyal et al. 2017, arXiv 1706.02677" if sgd else f"no rule is published for that of {optimizer_name}",
        )


def _warmup(plan: BatchPlan) -> Iterator[Scaled]:
    if plan.lr_scale is None or plan.lr_scale <= 1:
        return
    epochs = min(WARMUP_EPOCHS, plan.epochs or WARMUP_EPOCHS)
    rows = plan.dataset_size
    yield Scaled(
        name="warm-up steps",
        before=None if rows is None else epochs * divide_up(rows, plan.base_batch_size),
        after=plan.warmup_steps,
        formula=f"{counted(epochs, 'epoch')}, whatever the batch",
        source="Goyal et al. 2017, arXiv 1706.02677",
        evidence_range="256 to 8,192 rows: without warm-up 24.84 % error at 8,192, with it 23.74 %",
    )


def _ema(growth: float) -> Scaled:
    return Scaled(
        name="EMA decay",
        before=_USUAL_EMA,
        after=half_life_decay(_USUAL_EMA, growth),
        formula=f"{_USUAL_EMA}^{growth:.6g}, as an example",
        source="Busbridge et al. 2023, arXiv 2307.13813",
    )


def _batch_norm(plan: BatchPlan, setting: Setting) -> Iterator[Scaled]:
    momentum = setting.batch_norm_momentum
    if momentum is None or not 0 < momentum < 1 or plan.batch_size == plan.base_batch_size:
        return
    yield Scaled(
        name="BatchNorm momentum",
        before=momentum,
        after=batch_norm_momentum(momentum, plan.batch_size, plan.base_batch_size),
        formula=f"1 − (1 − {momentum:.6g})^({plan.batch_size} / {plan.base_batch_size})",
        source="by arithmetic; Goyal et al. 2017, arXiv 1706.02677, keep the rows that a device normalises over instead",
        caveat=f"only if one device ran the {plan.base_batch_size:,} rows of the base batch at once",
    )
