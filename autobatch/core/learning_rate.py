"""The learning-rate scaling rules, each with its formula, its evidence and its caveat as data."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import cast

from autobatch.core.errors import InvalidRequest

CustomRule = Callable[[float, int, int], float]

# The global batch size that learning rates are taken to suit where nothing else is said: the one of Goyal et al. 2017.
BASE_BATCH_SIZE = 256
# The largest growth of the batch for which the linear rule was published without loss of accuracy: 256 to 8,192.
EVIDENCED_GROWTH = 32
_NOISE_MOVES = "the noise scale grows during training, tenfold or more, and changes with the learning rate: measure it again on the way"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One way to scale a learning rate with the batch.

    Attributes:
        name: what ``lr_rule`` calls it.
        formula: the learning rate in terms of ``base_lr``, ``global_batch``, ``base_batch`` and ``noise_scale``.
        factor: ``factor(growth, noise)`` multiplies the base learning rate; ``growth`` is ``global_batch / base_batch`` and ``noise`` is
            ``noise_scale / base_batch``.
        evidence: where it was published.
        evidence_range: the batch sizes it was shown for.
        caveat: what is known against it when the batch grows by more than ``EVIDENCED_GROWTH``.
        needs_noise_scale: whether it cannot do without a gradient noise scale.
    """

    name: str
    formula: str
    factor: Callable[[float, float], float]
    evidence: str
    evidence_range: str
    caveat: str
    needs_noise_scale: bool = False


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            Rule(
                name="linear",
                formula="base_lr × global_batch / base_batch",
                factor=lambda growth, _: growth,
                evidence="Goyal et al. 2017, arXiv 1706.02677: ResNet-50, SGD with momentum, 5 epochs of warm-up",
                evidence_range="256 to 8,192 rows (32×)",
                caveat=(
                    "the linear rule is shown to hold up to 32× with warm-up (ResNet-50 on ImageNet, base batch 256): "
                    "top-1 error 23.60 % at 256, 23.74 % at 8,192 (32×), but 24.79 % at 16,384 (64×), "
                    "27.55 % at 32,768 (128×) and 33.96 % at 65,536 (256×)"
                ),
            ),
            Rule(
                name="sqrt",
                formula="base_lr × √(global_batch / base_batch)",
                factor=lambda growth, _: math.sqrt(growth),
                evidence="Krizhevsky 2014, arXiv 1404.5997; for RMSprop and Adam, Malladi et al. 2022, arXiv 2205.10287",
                evidence_range="1,024 to 4,096 sequences (4×) in the training of a language model, Merrill et al. 2025, arXiv 2505.23971",
                caveat=(
                    "far from the base batch the square root rule can ask too much: from batch size 1 to 1,024 language models "
                    "wanted about 3× the learning rate where the rule gives 32× (Marek et al. 2025, arXiv 2507.07101)"
                ),
            ),
            Rule(
                name="none",
                formula="base_lr",
                factor=lambda *_: 1.0,
                evidence="the learning rate as it was tuned",
                evidence_range="the base batch",
                caveat="the learning rate stays, so an epoch has far fewer steps of the same length: expect slower progress",
            ),
            Rule(
                name="noise",
                formula="base_lr × (1 + noise_scale / base_batch) / (1 + noise_scale / global_batch)",
                factor=lambda growth, noise: (1 + noise) / (1 + noise / growth),
                evidence="McCandlish et al. 2018, arXiv 1812.06162, equation 2.6; also AdaScale's gain (Johnson et al. 2020)",
                evidence_range="any batch, as far as the noise scale is known: to an order of magnitude",
                caveat=_NOISE_MOVES,
                needs_noise_scale=True,
            ),
            Rule(
                name="sqrt-saturating",
                formula="base_lr × √((1 + noise_scale / base_batch) / (1 + noise_scale / global_batch))",
                factor=lambda growth, noise: math.sqrt((1 + noise) / (1 + noise / growth)),
                evidence="for Adam and sign-like steps, Li et al. 2024, arXiv 2405.14578, equation 24",
                evidence_range="any batch, as far as the noise scale is known: to an order of magnitude",
                caveat=_NOISE_MOVES,
                needs_noise_scale=True,
            ),
            Rule(
                name="surge",
                formula="base_lr × (√(noise_scale / base_batch) + √(base_batch / noise_scale))"
                " / (√(noise_scale / global_batch) + √(global_batch / noise_scale))",
                factor=lambda growth, noise: (noise + 1) * math.sqrt(growth) / (noise + growth),
                evidence="for Adam, Li et al. 2024, arXiv 2405.14578, equation 2",
                evidence_range="batches well below the one at which the gradient's sign is certain; the rate peaks at the noise scale",
                caveat=_NOISE_MOVES,
                needs_noise_scale=True,
            ),
        )
    }
)

_SGD_FAMILY = ("sgd", "lars")
_ADAPTIVE_FAMILY = (
    "ada", "rmsprop", "lamb", "lion", "novograd", "sophia", "shampoo", "soap", "muon", "sign", "madgrad", "yogi",
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
        evidence_range: the batch sizes it was shown for.
        caveats: what to know before trusting it, empty when there is nothing.
    """

    lr: float
    scale: float
    rule: str
    formula: str
    evidence: str
    evidence_range: str = ""
    caveats: tuple[str, ...] = ()


def optimizer_family(optimizer_name: str) -> str | None:
    """Return ``"sgd"`` or ``"adaptive"`` for an optimizer's class name, ``None`` for one that is not known."""
    name = optimizer_name.lower()
    if any(word in name for word in _ADAPTIVE_FAMILY):
        return "adaptive"
    return "sgd" if any(word in name for word in _SGD_FAMILY) else None


def check_rule(rule: str | CustomRule, noise_scale: float | None = None) -> None:
    """Check that ``rule`` names a rule or is a callable, so that a mistake is told before anything runs.

    Raises:
        InvalidRequest: it is neither, or needs a noise scale and there is none.
    """
    if noise_scale is not None and (
        isinstance(noise_scale, bool) or not isinstance(noise_scale, Real) or not 0 < float(noise_scale) <= sys.float_info.max
    ):
        raise InvalidRequest(f"noise_scale is {noise_scale!r}; a number of rows above zero is wanted, for example 2000.")
    if callable(rule):
        return
    if not (isinstance(rule, str) and (rule in RULES or rule == "auto")):
        raise InvalidRequest(
            f"lr_rule is {rule!r}; known: {', '.join(RULES)}, auto, or a callable rule(base_lr, global_batch, base_batch) -> learning rate."
        )
    if rule != "auto" and RULES[rule].needs_noise_scale and noise_scale is None:
        raise InvalidRequest(
            f'lr_rule "{rule}" needs the gradient noise scale in rows, and none was given. autobatch.noise_scale(model, loader, loss_fn) '
            "measures it; pass noise_scale= (--noise-scale), or take a rule that needs none: linear, sqrt."
        )


def scale(
    rule: str | CustomRule,
    base_lr: float,
    global_batch: int,
    base_batch: int,
    optimizer_name: str = "",
    noise_scale: float | None = None,
) -> LearningRate:
    """Return the learning rate for ``global_batch`` rows a step, given that ``base_lr`` suits ``base_batch`` rows.

    Args:
        rule: a name in ``RULES``, ``"auto"`` (linear for the SGD family, sqrt for anything else), or
            ``rule(base_lr, global_batch, base_batch) -> lr``.
        base_lr: learning rate that was tuned, above zero.
        global_batch: rows that one optimizer step sees.
        base_batch: rows that one optimizer step saw when ``base_lr`` was tuned.
        optimizer_name: class name of the optimizer, empty when not known.
        noise_scale: the gradient noise scale in rows, for the rules that need it.

    Raises:
        InvalidRequest: the rule is not known, lacks its noise scale, or gives a learning rate that is not a number above zero.
    """
    check_rule(rule, noise_scale)
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
    factor = chosen.factor(global_batch / base_batch, (noise_scale or 0.0) / base_batch)
    caveats += _caveats(chosen, base_lr, global_batch, base_batch, optimizer_name)
    return LearningRate(
        lr=_checked(base_lr * factor, rule),
        scale=factor,
        rule=rule,
        formula=_with_figures(chosen.formula, base_lr, global_batch, base_batch, noise_scale),
        evidence=chosen.evidence,
        evidence_range=chosen.evidence_range,
        caveats=tuple(caveats),
    )


def _custom(rule: CustomRule, base_lr: float, global_batch: int, base_batch: int) -> LearningRate:
    name = getattr(rule, "__name__", type(rule).__name__)
    lr = _checked(rule(base_lr, global_batch, base_batch), name)
    formula = f"{name}({base_lr:.6g}, {global_batch}, {base_batch})"
    return LearningRate(lr=lr, scale=_checked(lr / base_lr, name), rule=name, formula=formula, evidence="the caller's own rule")


def _checked(value: object, rule: str) -> float:
    if not is_positive(value):
        raise InvalidRequest(
            f"lr_rule {rule} gave the learning rate {value!r}; a finite number above zero is wanted. "
            "Check the rule, base_lr and base_batch_size."
        )
    return float(cast(float, value))


def is_positive(value: object) -> bool:
    """Return whether ``value`` is a finite number above zero."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < cast(float, value) <= sys.float_info.max


def _with_figures(formula: str, base_lr: float, global_batch: int, base_batch: int, noise_scale: float | None) -> str:
    figures = {"base_lr": f"{base_lr:.6g}", "global_batch": str(global_batch), "base_batch": str(base_batch)}
    if noise_scale is not None:
        figures["noise_scale"] = f"{noise_scale:.6g}"
    for name, figure in figures.items():
        formula = formula.replace(name, figure)
    return formula


def _caveats(rule: Rule, base_lr: float, global_batch: int, base_batch: int, optimizer_name: str) -> list[str]:
    growth = global_batch / base_batch
    caveats = []
    if growth > EVIDENCED_GROWTH:
        caveats.append(f"the batch grows {growth:.4g}× over base_batch_size {base_batch}; {rule.caveat}")
    if rule.name == "linear" and growth != 1 and optimizer_family(optimizer_name) == "adaptive":
        careful = base_lr * RULES["sqrt"].factor(growth, 0.0)
        caveats.append(
            f"{optimizer_name} is adaptive, and the evidence for the linear rule is from SGD; "
            f'the square root rule (arXiv 2205.10287) gives {careful:.3g}, not {base_lr * growth:.3g}: lr_rule="sqrt"'
        )
    return caveats
