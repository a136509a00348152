"""Estimates for several cards as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autobatch.core.errors import NoBatchSizeFits
from autobatch.core.plan import BatchPlan
from autobatch.core.units import format_bytes, format_count


def estimate_lines(answers: Sequence[tuple[str, BatchPlan | NoBatchSizeFits]]) -> list[str]:
    """Return a table with one line a card: the batch size, the interval it is expected in, and the memory it needs."""
    rows = [("card", "memory", "batch size", "interval", "peak allocated", "limited by")]
    for name, plan in answers:
        if isinstance(plan, NoBatchSizeFits):
            rows.append((name, "", "none fits", "", f"needs {format_bytes(plan.needed or 0)}", "memory"))
            continue
        interval = f"{format_count(plan.low)} – {format_count(plan.high)}" if plan.low is not None and plan.high is not None else ""
        peak = format_bytes(plan.peak_allocated) if plan.peak_allocated is not None else ""
        rows.append(
            (plan.device, format_bytes(plan.budget), format_count(plan.batch_size), interval, peak, plan.limited_by.replace("_", " "))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def explained_lines(plan: BatchPlan, why: Mapping[str, Any], modules: int = 8) -> list[str]:
    """Return where the bytes are at the plan's peak, and what would change its batch size."""
    lines = [
        "",
        f"{plan.device}: where the bytes are at the peak of batch size {format_count(plan.batch_size)}, in the {why['phase']} phase",
    ]
    asked = sum(size for _, size in why["by_tag"])
    rest = (plan.peak_reserved or asked) - asked - why["workspace"]
    rows = [(tag, size) for tag, size in why["by_tag"] if size]
    rows += [
        ("cuBLAS workspace", why["workspace"]),
        ("reserved but unusable", max(0, rest)),
        ("CUDA context, outside the budget", why["context"]),
    ]
    lines += [f"  {name:<34}{format_bytes(size):>12}" for name, size in rows]
    lines.append("activations by module")
    lines += [f"  {name:<34}{format_bytes(size):>12}" for name, size in why["by_module"][:modules]]
    if len(why["by_module"]) > modules:
        left = why["by_module"][modules:]
        lines.append(f"  {f'{len(left)} more':<34}{format_bytes(sum(size for _, size in left)):>12}")
    now = why["by_memory"]
    lines.append(
        "what if" if now == plan.batch_size else f"what if, by memory alone: the {plan.limited_by.replace('_', ' ')} limits it now"
    )
    for name, outcome in why["what_if"].items():
        change = f"{format_count(outcome)} with {name}" if isinstance(outcome, int) else f"unknown with {name}: {outcome}"
        lines.append(f"  batch {format_count(now)} → {change}")
    return lines
