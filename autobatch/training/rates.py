"""A plan's learning rates written into an optimizer, once, and the warm-up that leads up to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import LBFGS
from torch.optim import Optimizer as Optimizer
from torch.optim.lr_scheduler import ConstantLR, LinearLR
from torch.optim.lr_scheduler import LRScheduler as LRScheduler

from autobatch.core.errors import InvalidRequest
from autobatch.core.learning_rate import optimizer_family
from autobatch.core.scaling import MARK
from autobatch.core.schedule import warmup_steps

if TYPE_CHECKING:
    from autobatch.core.plan import BatchPlan
    from autobatch.core.scaling import Scaled

# Learning rates that went through a tensor of 32 bits are as good as equal.
_CLOSE = 1e-5


def apply(plan: BatchPlan, optimizer: Any, everything: bool = False) -> tuple[Scaled, ...]:
    """Write the plan's learning rates into ``optimizer``; see ``BatchPlan.apply``."""
    _check_optimizer(plan, optimizer)
    lrs = _expected(plan, optimizer)
    rows = tuple(row for row in plan.scaling if row.written == "apply" or (everything and row.written == "everything"))
    options = [row for row in rows if row.name != "learning rate" and row.group is not None]
    for row in options:
        _check_option(row, optimizer.param_groups[row.group or 0])
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        if "initial_lr" in group and float(group["lr"]):
            # Left by a schedule of an earlier run; the next schedule would begin with it.
            group["initial_lr"] = group["initial_lr"] * (lr / float(group["lr"]))
        _write(group, "lr", lr)
        group[MARK] = plan.lr_scale
    for row in options:
        _write_option(row, optimizer.param_groups[row.group or 0])
    return rows


def warmup(plan: BatchPlan, optimizer: Any, samples: int | None = None, epochs: int | None = None) -> LRScheduler:
    """Return a schedule from the base learning rate up to the plan's; see ``BatchPlan.warmup``."""
    _check_one(optimizer)
    steps = _warmup_length(plan, samples, epochs)
    lrs = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    if not all(MARK in group for group in optimizer.param_groups) and not _alike(lrs, _lrs_for(plan, optimizer)):
        raise InvalidRequest(
            f"The optimizer's learning rate is {_named(lrs)}, not the plan's {_named(_lrs_for(plan, optimizer))} that a warm-up leads up "
            "to. Call plan.apply(optimizer) first."
        )
    if plan.lr_scale is None or plan.lr_scale <= 1 or steps == 0:
        return ConstantLR(optimizer, factor=1.0, total_iters=0)
    return LinearLR(optimizer, start_factor=1 / plan.lr_scale, end_factor=1.0, total_iters=steps)


def _check_optimizer(plan: BatchPlan, optimizer: Any) -> None:
    """Refuse whatever a plan's rates cannot be written into, or not again."""
    _check_one(optimizer)
    if plan.lr is None or plan.lr_scale is None:
        raise InvalidRequest("The plan has no learning rate to write. Plan with base_lr= or optimizer=.")
    if isinstance(optimizer, LBFGS) and plan.lr_scale != 1:
        raise InvalidRequest(
            "LBFGS finds the length of its steps from the curvature of one batch; no rule says how that scales with the batch size. "
            'Plan with lr_rule="none", or set its learning rate yourself.'
        )
    marked = [group for group in optimizer.param_groups if MARK in group]
    if marked:
        raise InvalidRequest(
            f"The optimizer's learning rate is scaled already (× {marked[0][MARK]:.6g}; it is {_named(_lrs_of(optimizer))} now), by "
            "plan.apply or in a state dict that was loaded. Leave this call out."
        )
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise InvalidRequest(
            "A learning-rate schedule was built on the optimizer already and keeps the learning rates it found. "
            "Call plan.apply(optimizer) before schedules are built."
        )
    name = type(optimizer).__name__
    families = optimizer_family(plan.optimizer_name), optimizer_family(name)
    if None not in families and families[0] != families[1]:
        raise InvalidRequest(f"The plan was made for {plan.optimizer_name}; this is {name}, whose rates scale otherwise. Plan with it.")


def _check_one(optimizer: Any) -> None:
    if isinstance(optimizer, (list, tuple)):
        raise InvalidRequest(f"{len(optimizer)} optimizers were given; a plan is for one. Plan and apply for each of them apart.")
    if not isinstance(optimizer, Optimizer):
        raise InvalidRequest(f"optimizer is a {type(optimizer).__name__}; a torch.optim.Optimizer is wanted.")


def _expected(plan: BatchPlan, optimizer: Optimizer) -> list[float]:
    """Return the learning rates to write, the optimizer being as it was when the plan was made, or at the plan's base rates."""
    now, lrs = _lrs_of(optimizer), _lrs_for(plan, optimizer)
    known = [list(plan.optimizer_lrs)] if plan.optimizer_lrs else []
    bases = [lr / (plan.lr_scale or 1.0) for lr in lrs]
    if plan.group_lrs and len(now) != len(plan.group_lrs):
        raise InvalidRequest(
            f"The optimizer has {len(now)} parameter groups; the plan was made for one with {len(plan.group_lrs)}. Plan with this one."
        )
    if any(_alike(now, before) for before in (bases, *known)):
        return lrs
    if _alike(now, lrs):
        raise InvalidRequest(f"The optimizer's learning rate is {_named(now)} already, what the plan asks for. Leave plan.apply out.")
    raise InvalidRequest(
        f"The optimizer's learning rate is {_named(now)}; the plan scales from {_named(known[0] if known else bases)}. "
        "Build the optimizer with that, or plan with base_lr= of this one."
    )


def _lrs_for(plan: BatchPlan, optimizer: Optimizer) -> list[float]:
    """Return the plan's learning rate of each group; those of groups that the plan does not know keep their ratio to the first."""
    if plan.group_lrs:
        return list(plan.group_lrs)
    now = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    first = next((lr for lr in now if lr > 0), None)
    return now if first is None or plan.lr is None else [plan.lr * lr / first for lr in now]


def _lrs_of(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _alike(some: Sequence[float], others: Sequence[float]) -> bool:
    return len(some) == len(others) and all(math.isclose(a, b, rel_tol=_CLOSE) for a, b in zip(some, others, strict=True))


def _named(lrs: Sequence[float]) -> str:
    return ", ".join(f"{lr:.6g}" for lr in lrs)


def _write(group: dict[str, Any], name: str, value: float) -> None:
    """Set an option of a parameter group, in place where it is a tensor that a captured graph reads."""
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


def _option(row: Scaled, group: dict[str, Any]) -> Any:
    """Return the value that ``row`` is about, as it is in ``group``."""
    if row.name in ("beta1", "beta2"):
        return group["betas"][int(row.name[-1]) - 1]
    return group[row.name.replace(" ", "_")]


def _check_option(row: Scaled, group: dict[str, Any]) -> None:
    now = float(_option(row, group))
    if row.before is not None and not math.isclose(now, row.before, rel_tol=_CLOSE):
        raise InvalidRequest(
            f"The optimizer's {row.name} is {now:.6g} in parameter group {row.group}; the plan scales it from {row.before:.6g}. "
            "Plan with this optimizer."
        )


def _write_option(row: Scaled, group: dict[str, Any]) -> None:
    after = float(row.after or 0.0)
    if row.name in ("beta1", "beta2"):
        place = int(row.name[-1]) - 1
        betas = list(group["betas"])
        if isinstance(betas[place], Tensor):
            betas[place].fill_(after)
        else:
            betas[place] = after
        group["betas"] = tuple(betas)
    else:
        _write(group, row.name.replace(" ", "_"), after)


def _warmup_length(plan: BatchPlan, samples: int | None, epochs: int | None) -> int:
    """Return the optimizer steps of the warm-up.

    Raises:
        InvalidRequest: both lengths are given, or none is known.
    """
    if samples is not None and epochs is not None:
        raise InvalidRequest(f"The warm-up is given as {samples:,} samples and as {epochs:,} epochs. Give one of the two.")
    if samples is not None:
        return warmup_steps(samples, plan.global_batch_size)
    if epochs is not None and plan.steps_per_epoch is not None:
        return epochs * plan.steps_per_epoch
    if epochs is None and plan.warmup_steps is not None:
        return plan.warmup_steps
    if plan.lr_scale is None or plan.lr_scale <= 1:
        return 0
    raise InvalidRequest("The plan does not know how long an epoch is. Give samples=, or plan with dataset_size=.")
