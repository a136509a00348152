"""``find`` on a real card, each answer held against an exhaustive scan around it and 200 training steps at it.

scripts/bench --cuda
"""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch

import autobatch
from autobatch.core.units import GIB, format_bytes
from autobatch.devices.cuda import CudaDevice
from benchmarks.cuda_models import MODELS, OPTIMIZERS

pytestmark = pytest.mark.cuda

TOLERANCE = 0.01
STEPS = 200


def train(arguments: dict[str, Any], batch_size: int, cap: int, steps: int) -> bool:
    """Return whether ``steps`` plain training steps of ``batch_size`` rows run under ``cap`` bytes, in a loop of their own."""
    device = CudaDevice(0)
    dtype = {"bf16": torch.bfloat16}.get(arguments["precision"])
    model = arguments["model"]
    fits = True
    try:
        with device.cap(cap, 0):
            model.cuda().train()
            optimizer = arguments["optimizer"](model.parameters())
            for _ in range(steps):
                batch = {
                    k: v.repeat(-(-batch_size // len(v)), *[1] * (v.dim() - 1))[:batch_size].cuda() for k, v in arguments["sample"].items()
                }
                with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                    output = model(**batch)
                    loss = output["loss"]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        fits = False
    batch = output = loss = optimizer = None  # what this frame holds would be missing from the next run
    model.zero_grad()
    model.cpu()
    gc.collect()
    torch.cuda.empty_cache()
    return fits


def largest(arguments: dict[str, Any], around: int, cap: int) -> int:
    """Return the largest size that runs three steps, every size from well below ``around`` upwards tried until three in a row fail."""
    step = max(1, around // 400)
    best, failed, size = 0, 0, max(1, around - 4 * step)
    while failed < 3:
        if train(arguments, size, cap, 3):
            best, failed = size, 0
        else:
            failed += 1
        size += step
        assert size < 2 * around + 10
    return best


@pytest.mark.parametrize("budget", [8 * GIB, 24 * GIB, None], ids=["8GiB", "24GiB", "whole"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_find(name: str, precision: str, optimizer: str, budget: int | None, record: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    model, sample = MODELS[name]()
    arguments = {"model": model, "sample": sample, "optimizer": OPTIMIZERS[optimizer], "precision": precision}
    started = time.perf_counter()
    plan = autobatch.find(**arguments, device="cuda", memory_budget=budget, tolerance=TOLERANCE)  # type: ignore[arg-type]
    seconds = time.perf_counter() - started
    scanned = largest(arguments, plan.batch_size, plan.cap)
    lasts = train(arguments, plan.batch_size, plan.cap, STEPS)
    record.append(
        {
            "model": name,
            "precision": precision,
            "optimizer": optimizer,
            "budget": format_bytes(plan.budget),
            "batch_size": plan.batch_size,
            "largest_by_scan": scanned,
            "steps_at_the_answer": STEPS,
            "lasts": lasts,
            "probes": len(plan.probes),
            "out_of_memory": sum(not probe.outcome.fits for probe in plan.probes),
            "rows_over_answer": round(sum(p.batch_size for p in plan.probes if not p.confirmation) / plan.batch_size, 2),
            "seconds": round(seconds, 1),
            "seconds_in_trials": round(sum(probe.seconds or 0 for probe in plan.probes), 1),
            "peak_allocated": plan.peak_allocated,
            "cap": plan.cap,
        }
    )
    assert lasts
    assert plan.batch_size <= scanned
    assert plan.batch_size >= int(scanned * (1 - TOLERANCE)) - 1
