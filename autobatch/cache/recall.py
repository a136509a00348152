"""A plan that was kept, where it still answers what is asked; else a new one, which is kept."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from autobatch._version import __version__
from autobatch.cache.sources import sources
from autobatch.cache.store import Origin, PlanCache
from autobatch.core.plan import BatchPlan
from autobatch.core.units import format_bytes

if TYPE_CHECKING:
    from autobatch.devices.base import Device

# How much more memory may be free before a larger batch is worth measuring again.
_MORE = 0.05
# Limits that more memory would not move.
_NOT_MEMORY = ("max_batch_size", "dataset", "global_batch_size", "kernel_limit", "crash")
# What libraries read from the environment; which card is visible is told by the card itself.
_VARIABLES = ("PYTORCH_", "TORCH_BLAS_", "TORCH_CUDNN_", "CUDA_", "CUBLAS", "CUDNN_", "NVIDIA_TF32_", "OMP_", "MKL_", "KMP_", "MALLOC_")
_NOT_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_PATH")
_HERE_TIMEOUT = 120.0  # seconds in which torch is loaded and a card opened
_TELL = "import json, sys\nfrom autobatch.cache.recall import here\njson.dump(here(*json.load(sys.stdin)), sys.stdout)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked, as a key, and what only now can tell.

    Attributes:
        what: the model's class or the TARGET, for people.
        cap: returns the bytes a trial could use now.
        key: SHA-256 of everything the answer depends on; empty where that cannot be told.
        why_not: why it cannot.
    """

    what: str
    cap: Callable[[], int]
    key: str = ""
    why_not: str = ""


def recall(cache: PlanCache, question: Question, measure: Callable[[], BatchPlan]) -> BatchPlan:
    """Return the plan kept for ``question`` where it still holds, else what ``measure`` returns, which is kept.

    Notes on the plan say which of the two it is, and why a plan that was kept was not used.
    """
    if not question.key:
        return _noted(measure(), f"not kept in the cache: {question.why_not}")
    kept, note = cache.load(question.key)
    if kept is not None:
        cap = question.cap()
        if still_holds(kept.plan, cap):
            note = f"from the cache: measured on {kept.origin.when}; cache=False (--no-cache) measures again"
            return _noted(kept.plan, note)
        note = (
            f"the plan in the cache was not used: it was measured with {format_bytes(kept.plan.cap)} for a trial, and now it is "
            f"{format_bytes(cap)}"
        )
    plan = measure()
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return _noted(plan, note, cache.save(Origin(key=question.key, made=made, what=question.what), plan))


def still_holds(plan: BatchPlan, cap: int) -> bool:
    """Return whether ``plan`` is right where a trial may use ``cap`` bytes now.

    It must fit: ``cap`` covers all that its batch size was given, which is what the caching allocator reserved at its highest, or, where
    no allocator tells, the cap of its own trials. The same steps ask for the same memory, so a trial that passed under the one passes
    under the other. And it must still be the largest: there are not more than 5 % beyond its own cap, unless something else than memory
    limits it.
    """
    needed = plan.cap if plan.peak_reserved is None else plan.peak_reserved
    return needed <= cap and (plan.limited_by in _NOT_MEMORY or cap <= plan.cap * (1 + _MORE))


def question_of_step(what: Mapping[str, Any], where: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Question, Any]:
    """Return ``find``'s question, and the sample as it was read for it.

    Args:
        what: ``build_workload``'s arguments.
        where: ``device``, ``memory_budget`` and ``margin``.
        options: everything else that decides the answer.

    Raises:
        AutobatchError: the device cannot be had, or the sample cannot be meant.
    """
    from autobatch.devices import open_device
    from autobatch.workload.description import Undescribable, describe, describe_step

    device, name = open_device(where["device"]), type(what["model"]).__name__
    sample = what["sample"]
    try:
        step, sample = describe_step(what)
        asked = {"step": step, **describe({"where": {**where, "device": _told(device)}, "options": options})}
    except Undescribable as reason:
        return Question(what=name, cap=lambda: 0, why_not=str(reason)), sample
    return Question(what=name, cap=lambda: _cap(device, where["memory_budget"], where["margin"]), key=key_of(asked)), sample


def question_of_target(target: str, options: Mapping[str, Any]) -> Question:
    """Return the command line's question: the target's text and files, all options, the device.

    The device is asked in a process of its own, so that this one holds nothing on a card while a worker measures.
    """
    budget = [options[name] for name in ("device", "memory_budget", "margin")]
    try:
        files = sources(target)
        ask = [sys.executable, "-c", _TELL]
        told = subprocess.run(ask, input=json.dumps(budget), capture_output=True, text=True, check=False, timeout=_HERE_TIMEOUT)
        if told.returncode != 0:
            raise ValueError(told.stderr.strip().rpartition("\n")[2])
        facts = json.loads(told.stdout)
    except (OSError, SyntaxError, ValueError, subprocess.SubprocessError) as reason:
        return Question(what=target, cap=lambda: 0, why_not=f"{target} or its device could not be told ({reason})")
    asked = {"target": target, "files": files, "options": dict(options), "device": facts["device"]}
    return Question(what=target, cap=lambda: int(facts["cap"]), key=key_of(asked))


def key_of(asked: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what is ``asked``, in hexadecimal; equal questions have equal keys in every process."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def here(device: str | None, memory_budget: int | float | str | None, margin: float) -> dict[str, Any]:
    """Return what an answer depends on beside the question, and what a trial could use now, as plain JSON values.

    Raises:
        AutobatchError: the device cannot be had, or the budget cannot be meant.
    """
    from autobatch.devices import open_device

    opened = open_device(device)
    return {"device": _told(opened), "cap": _cap(opened, memory_budget, margin)}


def _told(device: Device) -> dict[str, Any]:
    import torch

    variables = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES) and name not in _NOT_VARIABLES}
    return {
        "name": device.name,
        "description": device.description,
        "capability": device.capability,
        "environment": device.environment(),
        "autobatch": __version__,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "machine": [platform.system(), platform.machine()],
        "variables": variables,
    }


def _cap(device: Device, memory_budget: int | float | str | None, margin: float) -> int:
    from autobatch.devices.base import set_budget

    return set_budget(device.memory(), memory_budget, margin)[1]


def _noted(plan: BatchPlan, *notes: str) -> BatchPlan:
    return replace(plan, notes=(*plan.notes, *filter(None, notes)))
