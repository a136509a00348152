"""What a plan scales with its batch size, as rows of a table."""

from __future__ import annotations

from autobatch.core.plan import BatchPlan
from autobatch.core.scaling import Scaled
from autobatch.core.units import counted

_WHO_SETS_IT = {"everything": "set by apply(optimizer, everything=True)", "nothing": "yours to set"}


def rate_rows(plan: BatchPlan) -> list[tuple[str, str]]:
    """Return the learning rate and why, the warm-up, and what else goes with the batch, as keys and values."""
    if plan.lr is None:
        return []
    rows = [("learning rate", f"{plan.lr:.3g} ({plan.lr_rule}: {plan.lr_formula})")]
    source = next((row for row in plan.scaling if row.name == "learning rate" and row.source), None)
    if source is not None and plan.lr_scale != 1:
        rows.append(("  after", source.source))
        if source.evidence_range:
            rows.append(("  shown for", source.evidence_range))
    if len(plan.group_lrs) > 1:
        rows.append(("  by group", ", ".join(f"{lr:.3g}" for lr in plan.group_lrs)))
    if plan.warmup_steps != 0 and plan.base_lr is not None:
        steps = "5 epochs" if plan.warmup_steps is None else counted(plan.warmup_steps, "optimizer step")
        rows.append(("warm-up", f"linear, from {plan.base_lr:.3g} to {plan.lr:.3g} over the first {steps}"))
    others = [row for row in plan.scaling if row.name not in ("learning rate", "warm-up steps")]
    return rows + list(dict.fromkeys(pair for row in others for pair in _rows(row)))  # parameter groups are often alike


def _rows(row: Scaled) -> list[tuple[str, str]]:
    key, momentum, _ = row.name.partition(" momentum")
    what = f"{momentum.strip()} " if momentum else ""
    if row.before == row.after:
        return [(key, f"{row.before:.4g}, {row.formula} ({row.source})")]
    rows = [(key, f"{what}{row.before:.6g} → {row.after:.6g} ({row.formula}), {_WHO_SETS_IT[row.written]}")]
    return rows + ([("  but", row.caveat)] if row.caveat else [])
