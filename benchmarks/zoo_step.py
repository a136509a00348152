"""How an entry of the zoo is trained on a card, and what the allocator says of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from autobatch.workload.batches import to_device
from autobatch.workload.workload import Workload

# The optimizer's state is there from the second on; the third shows what fragments settle at.
_STEPS = 3
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train(work: Workload, batch_size: int, *, compiled: bool = False) -> dict[str, dict[str, int]]:
    """Run the steps as a plain training loop would and return the peaks of both phases; a ``GradScaler`` for fp16."""
    model, dtype = work.model, _DTYPES.get(work.precision or "")
    called: Any = torch.compile(model) if compiled else model
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    peaks: dict[str, dict[str, int]] = {}
    assert work.optimizer is not None
    model.train()
    for _ in range(_STEPS):
        with _peak_of("forward_backward", peaks):
            batch = to_device(work.make_batch(batch_size), torch.device("cuda"))
            with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                loss, output = work.loss(called, batch)  # noqa: RUF059 held as a loop would hold it
            assert loss is not None
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        with _peak_of("optimizer", peaks):
            scaler.step(work.optimizer)
            scaler.update()
            if scaler.is_enabled() and not work.optimizer.state:
                work.optimizer.step()  # the scaler skips it where gradients overflow at the first scale
        model.zero_grad(set_to_none=True)
    return peaks


@contextlib.contextmanager
def _peak_of(phase: str, peaks: dict[str, dict[str, int]]) -> Iterator[None]:
    """Raise the peaks of ``phase`` to what is reached inside."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    known = peaks.setdefault(phase, {})
    for key in ("allocated", "requested", "reserved"):
        known[key] = max(known.get(key, 0), int(stats.get(f"{key}_bytes.all.peak", 0)))
