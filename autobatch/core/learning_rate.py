"""The learning-rate scaling rules, each with its formula, its evidence and its caveat as data."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from autobatch.core.errors import InvalidRequest
from autobatch.core.records import Setting

if TYPE_CHECKING:
    from autobatch.core.options import PlanRequest

CustomRule = Callable[[float, int, int], float]

# The global batch size that learning rates are taken to suit where nothing else is said: the one of Goyal et al. 2017.
BASE_BATCH_SIZE = 256
# The largest growth of the batch for which the linear rule was published without loss of accuracy: 256 to 8,192.
EVIDENCED_GROWTH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One way to scale a learning rate with the batch.

    Attributes:
        name: what ``lr_rule`` calls it.
        formula: the learning rate in terms of ``base_lr``, ``global_batch`` and ``base_batch``.
        factor: ``factor(global_batch / base_batch)`` multiplies the base learning rate.
        evidence: where it was published.
        caveat: what is known against it when the batch grows by more than ``EVIDENCED_GROWTH``.
    """

    name: str
    formula: str
    factor: Callable[[float], float]
    evidence: str
    caveat: str


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            Rule(
                name="linear",
                formula="base_lr × global_batch / base_batch",
                factor=lambda growth: growth,
                evidence="Goyal et al. 2017, arXiv 1706.02677: ResNet-50, SGD with momentum, 5 epochs of warm-up",
                caveat=(
                    "the linear rule is shown to hold up to 32× with warm-up (ResNet-50 on ImageNet, base batch 256): "
                    "top-1 error 23.60 % at 256, 23.74 % at 8,192 (32×), but 24.79 % at 16,384 (64×), "
                    "27.55 % at 32,768 (128×) and 33.96 % at 65,536 (256×)"
                ),
            ),
            Rule(
                name="sqrt",
                formula="base_lr × √(global_batch / base_batch)",
                factor=math.sqrt,
                evidence="Krizhevsky 2014, arXiv 1404.5997; for RMSprop and Adam, Malladi et al. 2022, arXiv 2205.10287",
                caveat=(
                    "far from the base batch the square root rule can ask too much: from batch size 1 to 1,024 language models "
                    "wanted about 3× the learning rate where the rule gives 32× (Marek et al. 2025, arXiv 2507.07101)"
                ),
            ),
            Rule(
                name="none",
                formula="base_lr",
                factor=lambda _: 1.0,
                evidence="the learning rate as it was tuned",
                caveat="the learning rate stays, so an epoch has far fewer steps of the same length: expect slower progress",
            ),
        )
    }
)

_SGD_FAMILY = ("sgd", "lars")
_ADAPTIVE_FAMILY = (
    "adam", "adagrad", "adadelta", "adafactor", "adabelief", "adan", "rmsprop", "lamb", "lion", "novograd", "sophia", "shampoo",
    "soap", "muon",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRate:
    """A scaled learning rate and where it comes from.

    Attributes:
        lr: the learning rate for the global batch.
        scale: ``lr`` divided by the base learning rate.
        rule: name of the rule that was applied: ``"auto"`` is resolved, a callable has its own name.
        formula: the formula with its figures, ``"0.1 × 512 / 256"``.
        evidence: where the rule was published.
        caveats: what to know before trusting it, empty when there is nothing.
    """

    lr: float
    scale: float
    rule: str
    formula: str
    evidence: str
    caveats: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRates:
    """The learning rates of a whole optimizer.

    Attributes:
        base_lr: learning rate the scaling started from, ``None`` when there is none.
        scaled: what became of it, ``None`` when there is none.
        lrs: scaled learning rate of every parameter group, in order; empty without an optimizer.
        notes: what was assumed, and the caveats.
    """

    base_lr: float | None = None
    scaled: LearningRate | None = None
    lrs: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


def optimizer_family(optimizer_name: str) -> str | None:
    """Return ``"sgd"`` or ``"adaptive"`` for an optimizer's class name, ``None`` for one that is not known."""
    name = optimizer_name.lower()
    if any(word in name for word in _ADAPTIVE_FAMILY):
        return "adaptive"
    return "sgd" if any(word in name for word in _SGD_FAMILY) else None


def check_rule(rule: str | CustomRule) -> None:
    """Check that ``rule`` names a rule or is a callable, so that a typing error is told before anything runs.

    Raises:
        InvalidRequest: it is neither.
    """
    if not callable(rule) and not (isinstance(rule, str) and (rule in RULES or rule == "auto")):
        raise InvalidRequest(
            f"lr_rule is {rule!r}; known: {', '.join(RULES)}, auto, or a callable rule(base_lr, global_batch, base_batch) -> learning rate."
        )


def scale(rule: str | CustomRule, base_lr: float, global_batch: int, base_batch: int, optimizer_name: str = "") -> LearningRate:
    """Return the learning rate for ``global_batch`` rows a step, given that ``base_lr`` suits ``base_batch`` rows.

    Args:
        rule: a name in ``RULES``, ``"auto"`` (linear for the SGD family, sqrt for anything else), or
            ``rule(base_lr, global_batch, base_batch) -> lr``.
        base_lr: learning rate that was tuned, above zero.
        global_batch: rows that one optimizer step sees.
        base_batch: rows that one optimizer step saw when ``base_lr`` was tuned.
        optimizer_name: class name of the optimizer, empty when not known.

    Raises:
        InvalidRequest: the rule is not known, or gives a learning rate that is not a number above zero.
    """
    check_rule(rule)
    if not isinstance(rule, str):
        return _custom(rule, base_lr, global_batch, base_batch)
    caveats = []
    if rule == "auto":
        family = optimizer_family(optimizer_name)
        rule = "linear" if family == "sgd" else "sqrt"
        if family is None:
            which = f"the optimizer {optimizer_name} is not known" if optimizer_name else "the optimizer is not known"
            caveats.append(f'{which}: lr_rule "auto" took the more careful square root rule; name one with lr_rule=')
    chosen = RULES[rule]
    factor = chosen.factor(global_batch / base_batch)
    lr = _checked(base_lr * factor, rule)
    formula = _with_figures(chosen.formula, base_lr, global_batch, base_batch)
    caveats += _caveats(chosen, base_lr, global_batch, base_batch, optimizer_name)
    return LearningRate(lr=lr, scale=factor, rule=rule, formula=formula, evidence=chosen.evidence, caveats=tuple(caveats))


def group_rates(setting: Setting, request: PlanRequest, global_batch: int) -> GroupRates:
    """Return the learning rates for ``global_batch`` rows a step: from ``request.base_lr``, else from the optimizer's own.

    ``base_lr`` is the rate of the first parameter group that has one above zero; the other groups keep their ratio to it.

    Raises:
        InvalidRequest: the rule is not known, or gives a learning rate that is not a number above zero.
    """
    check_rule(request.lr_rule)
    groups = setting.group_lrs
    own = next((lr for lr in groups if lr > 0), None) if all(map(math.isfinite, groups)) else None
    base_lr = request.base_lr if request.base_lr is not None else own
    if base_lr is None:
        return GroupRates(notes=_no_rate(setting))
    scaled = scale(request.lr_rule, float(base_lr), global_batch, request.base_batch_size, setting.optimizer_name)
    lrs = () if own is None else tuple(scaled.lr * (lr / own) for lr in groups)
    notes = []
    if request.base_lr is None and request.base_batch_size == BASE_BATCH_SIZE and scaled.scale != 1:
        notes.append(
            f"the optimizer's learning rate {base_lr:.6g} is taken to suit a global batch of {request.base_batch_size:,} rows; "
            "if it was tuned at another, pass base_batch_size="
        )
    if request.base_lr is not None and len(groups) > 1 and own is not None:
        notes.append(f"base_lr {base_lr:.6g} replaces the optimizer's {own:.6g}; its other parameter groups keep their ratio to that")
    return GroupRates(base_lr=float(base_lr), scaled=scaled, lrs=lrs, notes=(*notes, *scaled.caveats))


def _no_rate(setting: Setting) -> tuple[str, ...]:
    if setting.mode != "train":
        return ()
    if setting.group_lrs:
        rates = ", ".join(f"{lr:g}" for lr in setting.group_lrs)
        return (f"no learning rate: the optimizer's own is {rates} (a schedule may have set it); pass base_lr=",)
    return ("no learning rate: pass base_lr= and base_batch_size=, the global batch size it was tuned at",)


def _custom(rule: CustomRule, base_lr: float, global_batch: int, base_batch: int) -> LearningRate:
    name = getattr(rule, "__name__", type(rule).__name__)
    lr = _checked(rule(base_lr, global_batch, base_batch), name)
    formula = f"{name}({base_lr:.6g}, {global_batch}, {base_batch})"
    return LearningRate(lr=lr, scale=_checked(lr / base_lr, name), rule=name, formula=formula, evidence="the caller's own rule")


def _checked(value: object, rule: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < cast(float, value) <= sys.float_info.max:
        raise InvalidRequest(
            f"lr_rule {rule} gave the learning rate {value!r}; a finite number above zero is wanted. "
            "Check the rule, base_lr and base_batch_size."
        )
    return float(value)


def _with_figures(formula: str, base_lr: float, global_batch: int, base_batch: int) -> str:
    figures = {"base_lr": f"{base_lr:.6g}", "global_batch": str(global_batch), "base_batch": str(base_batch)}
    for name, figure in figures.items():
        formula = formula.replace(name, figure)
    return formula


def _caveats(rule: Rule, base_lr: float, global_batch: int, base_batch: int, optimizer_name: str) -> list[str]:
    growth = global_batch / base_batch
    caveats = []
    if growth > EVIDENCED_GROWTH:
        caveats.append(f"the batch grows {growth:.4g}× over base_batch_size {base_batch}; {rule.caveat}")
    if rule.name == "linear" and growth != 1 and optimizer_family(optimizer_name) == "adaptive":
        careful = base_lr * RULES["sqrt"].factor(growth)
        caveats.append(
            f"{optimizer_name} is adaptive, and the evidence for the linear rule is from SGD; "
            f'the square root rule (arXiv 2205.10287) gives {careful:.3g}, not {base_lr * growth:.3g}: lr_rule="sqrt"'
        )
    return caveats
