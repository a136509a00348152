"""Plans, probes and settings as lines of plain text; prints nothing."""

from __future__ import annotations

import textwrap

from autobatch.core.plan import BatchPlan
from autobatch.core.records import Outcome, Probe, ProcessMemory, Setting
from autobatch.core.text import plain as plain
from autobatch.core.throughput import Throughput
from autobatch.core.units import counted, format_bytes
from autobatch.report.scaling import rate_rows

_WIDTH = 100
_KEY = 16
_MAX_MESSAGE = 120
_MAX_OTHERS = 5

_VERDICTS = {
    Outcome.FIT: "fits",
    Outcome.TIGHT: "too tight",
    Outcome.OOM: "out of memory",
    Outcome.HOST_OOM: "out of host memory",
    Outcome.KERNEL_LIMIT: "kernel limit",
    Outcome.TIMEOUT: "timed out",
    Outcome.CRASHED: "crashed",
}
_WALLS = {
    Outcome.TIGHT: "fitted only after the allocator had run out and retried",
    Outcome.OOM: "ran out of memory",
    Outcome.HOST_OOM: "ran out of host memory",
    Outcome.KERNEL_LIMIT: "is beyond what a kernel can index, whatever the memory",
    Outcome.TIMEOUT: "did not end in time",
    Outcome.CRASHED: "crashed the worker",
}


def answer_line(plan: BatchPlan) -> str:
    """Return the answer in one line: ``batch size 118 · learning rate 0.000461 · 13 iterations per epoch``."""
    parts = [f"batch size {plan.batch_size}"]
    if plan.accumulation_steps > 1:
        parts.append(f"{plan.accumulation_steps} accumulation steps")
    if plan.lr is not None:
        parts.append(f"learning rate {plan.lr:.3g}")
    if plan.iterations_per_epoch is not None:
        parts.append(f"{counted(plan.iterations_per_epoch, 'iteration')} per epoch")
    return " · ".join(parts)


def args_line(plan: BatchPlan) -> str:
    """Return the answer as options for a training script: ``--batch-size 384 --lr 0.15``."""
    parts = [f"--batch-size {plan.batch_size}"]
    if plan.lr is not None:
        parts.append(f"--lr {plan.lr:.6g}")
    if plan.accumulation_steps > 1:
        parts.append(f"--gradient-accumulation-steps {plan.accumulation_steps}")
    return " ".join(parts)


def env_lines(plan: BatchPlan) -> list[str]:
    """Return the answer as variables for a job script, one assignment a line."""
    return [
        f"AUTOBATCH_BATCH_SIZE={plan.batch_size}",
        *([f"AUTOBATCH_LR={plan.lr:.6g}"] if plan.lr is not None else []),
        f"AUTOBATCH_ACCUMULATION_STEPS={plan.accumulation_steps}",
        f"AUTOBATCH_GLOBAL_BATCH_SIZE={plan.global_batch_size}",
    ]


def setting_lines(setting: Setting) -> list[str]:
    """Return what a search starts from: the device, the budget and the cap, and who else holds memory."""
    capacity, budget, cap = (format_bytes(size) for size in (setting.reading.capacity, setting.budget, setting.cap))
    lines = [
        f"device    {plain(_device(setting.device, setting.device_description))}, {capacity}",
        f"budget    {budget}, trials capped at {cap} (margin {_percent(setting.margin)})",
    ]
    if setting.resident:
        lines.append(f"resident  {format_bytes(setting.resident)} of parameters, buffers, gradients and optimizer state")
    others = setting.reading.others
    if others:
        more = [f"{len(others) - _MAX_OTHERS} more"] if len(others) > _MAX_OTHERS else []
        lines.append("others    " + ", ".join([_other(other) for other in others[:_MAX_OTHERS]] + more))
    return lines


def probe_line(probe: Probe, cap: int | None) -> str:
    """Return how one trial ended: size, verdict, peak against ``cap`` bytes, seconds a step and in all."""
    verdict = "fits, confirmed" if probe.confirmation and probe.outcome.fits else _VERDICTS[probe.outcome]
    if probe.confirmation and not probe.outcome.fits:
        verdict += " (confirming)"
    line = f"batch size {probe.batch_size:>7}  {verdict:<18}  {_peak(probe.peak_allocated, cap):<34}"
    if probe.seconds_per_step is not None:
        line += f"  {_seconds(probe.seconds_per_step)}/step"
    if probe.seconds is not None:
        line += f"  {_seconds(probe.seconds)} in all"
    # Running out of memory says no more than the verdict does; the other reasons are worth their words.
    if probe.message and probe.outcome not in (Outcome.FIT, Outcome.OOM):
        message = plain(probe.message)
        line += f"  {message if len(message) <= _MAX_MESSAGE else message[: _MAX_MESSAGE - 1] + '…'}"
    return line.rstrip()


def plan_lines(plan: BatchPlan) -> list[str]:
    """Return the whole plan but its probes as aligned lines, the notes below."""
    rows = [*_size_rows(plan), *rate_rows(plan), *_epoch_rows(plan), *_memory_rows(plan), *_origin_rows(plan)]
    lines = [f"{key:<{_KEY}}  {plain(value)}" for key, value in rows]
    if plan.notes:
        lines.append("notes")
    for note in plan.notes:
        lines += textwrap.wrap(plain(note), _WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)
    return lines


def _size_rows(plan: BatchPlan) -> list[tuple[str, str]]:
    rows = [("batch size", f"{plan.batch_size:,}" + (" per device" if plan.world_size > 1 else ""))]
    if plan.accumulation_steps > 1:
        rows.append(("accumulation", f"{plan.accumulation_steps:,} batches per optimizer step; divide each loss by that number"))
    elif plan.limited_by == "global_batch_size":
        rows.append(("accumulation", "none: one batch is all of a device's share of the global batch"))
    if plan.global_batch_size != plan.batch_size:
        steps, devices = counted(plan.accumulation_steps, "accumulation step"), counted(plan.world_size, "device")
        rows.append(("global batch", f"{plan.global_batch_size:,} ({plan.batch_size:,} × {steps} × {devices})"))
    return rows


def _epoch_rows(plan: BatchPlan) -> list[tuple[str, str]]:
    if plan.iterations_per_epoch is None or plan.steps_per_epoch is None:
        return []
    iterations = f"{plan.iterations_per_epoch:,} per epoch of {counted(plan.dataset_size or 0, 'row')}"
    if plan.last_batch_size != plan.batch_size:
        iterations += f", the last of {counted(plan.last_batch_size or 0, 'row')}"
    rows = [("iterations", iterations)]
    if plan.accumulation_steps > 1 or plan.total_steps is not None:
        total = "" if plan.total_steps is None else f", {plan.total_steps:,} in {counted(plan.epochs or 0, 'epoch')}"
        rows.append(("optimizer steps", f"{plan.steps_per_epoch:,} per epoch{total}"))
    return rows


def _memory_rows(plan: BatchPlan) -> list[tuple[str, str]]:
    reserved = "" if plan.peak_reserved is None else f"; reserved {format_bytes(plan.peak_reserved)}"
    headroom = "" if plan.headroom is None else f", headroom {format_bytes(plan.headroom)}"
    return [
        ("peak allocated", _peak(plan.peak_allocated, plan.cap) + reserved),
        ("budget", f"{format_bytes(plan.budget)}, margin {_percent(plan.margin)}{headroom}"),
        ("limited by", _limit(plan)),
    ]


def _origin_rows(plan: BatchPlan) -> list[tuple[str, str]]:
    rows = []
    if plan.seconds_per_step is not None:
        rate = "" if plan.samples_per_second is None else f", {plan.samples_per_second:,.4g} samples/s"
        rows.append(("speed", f"{_seconds(plan.seconds_per_step)} per step{rate}"))
    if plan.throughput is not None and plan.throughput.residual is not None:
        rows.append(("  knee", _knee(plan.throughput)))
    failed = sum(not probe.outcome.fits for probe in plan.probes)
    return [
        *rows,
        ("device", _device(plan.device, plan.device_description)),
        ("evidence", f"{plan.evidence}: {counted(len(plan.probes), 'probe')}, {failed} of which did not fit"),
    ]


def _limit(plan: BatchPlan) -> str:
    """Return what keeps the batch size from being larger, in one sentence."""
    best = f"{plan.best:,}"
    sentences = {
        "memory": f"memory: {_wall(plan)}",
        "kernel_limit": f"kernel limit: {_wall(plan)}",
        "crash": f"crash: {_wall(plan)}",
        "max_batch_size": f"max_batch_size: {best} fits and nothing larger is permitted",
        "dataset": f"dataset: {best} fits, and a larger batch would be more than the data set has",
        "global_batch_size": f"global_batch_size: {best} fits and is all of a device's share",
        "throughput": f"throughput: {best} fits too, but is hardly faster{_gain(plan)}",
        "time_limit": f"time_limit: the search was stopped when {best} was the largest size known to fit",
    }
    share = ""
    if plan.batch_size < plan.best and plan.limited_by != "throughput":
        share = f"; {best} fits, and {plan.batch_size:,} is the equal share of the global batch"
    return sentences.get(plan.limited_by, plan.limited_by) + share


def _gain(plan: BatchPlan) -> str:
    return "" if plan.throughput is None else f" ({_percent(1 - plan.throughput.fraction)} or less)"


def _knee(line: Throughput) -> str:
    """Return from which size on a batch is hardly faster, and why, in one sentence."""
    off = f"{_percent(round(line.residual or 0.0, 3))} off at the most"
    if not line.holds:
        return f"not predicted: times are on no line of a + b × rows ({off})"
    parts = f"{_seconds(line.seconds_per_batch)} per batch + {_seconds(line.seconds_per_sample)} per row, {off}"
    return f"{counted(line.knee, 'row')} for {_percent(line.fraction)} of the best samples/s ({parts})"


def _wall(plan: BatchPlan) -> str:
    if plan.wall is None:
        return f"nothing above {plan.best:,} fitted"
    if plan.wall_kind == "predicted":
        return f"{plan.wall:,} is predicted not to fit"
    outcomes = [probe.outcome for probe in plan.probes if probe.batch_size == plan.wall and not probe.outcome.fits]
    return f"{plan.wall:,} {_WALLS[outcomes[-1]] if outcomes else 'did not fit'}"


def _peak(peak: int | None, cap: int | None) -> str:
    if cap is None:
        return "peak unknown" if peak is None else format_bytes(peak)
    if peak is None:
        return f"peak unknown, cap {format_bytes(cap)}"
    share = f" ({peak / cap:.1%})".replace("%", " %") if cap else ""
    return f"{format_bytes(peak)} of {format_bytes(cap)}{share}"


def _device(name: str, description: str) -> str:
    return f"{name} ({description})" if description and description.lower() != name.lower() else name


def _other(other: ProcessMemory) -> str:
    used = "an unknown amount" if other.used is None else format_bytes(other.used)
    return f"{plain(other.name) or 'a process'} (pid {other.pid}) {used}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"
