"""The contracts on a real card: the cap, peaks, state, sticky errors, the worker."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autobatch
from autobatch import NoBatchSizeFits, Outcome
from autobatch.core.units import GIB, MIB
from autobatch.devices.cuda import CudaDevice


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(8),
        nn.Flatten(),
        nn.Linear(64 * 64, 10),
    )


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 3, 64, 64), torch.randint(0, 10, (4,))


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.cpu().numpy().tobytes(), value.device, value.data_ptr()
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return {
        "model": plain(dict(model.state_dict())),
        "optimizer": plain(optimizer.state_dict()),
        "grads": [plain(p.grad) for p in model.parameters()],
        "random": (torch.get_rng_state().tolist(), [s.tolist() for s in torch.cuda.get_rng_state_all()]),
        "fraction": torch.cuda.get_per_process_memory_fraction() if hasattr(torch.cuda, "get_per_process_memory_fraction") else None,
    }


@pytest.mark.parametrize("home", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_find_is_exact_and_leaves_every_byte(home: str, precision: str) -> None:
    model = network().to(home)
    optimizer = torch.optim.AdamW(model.parameters())
    inputs, labels = (t.to(home) for t in sample())
    F.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
    before = state(model, optimizer)
    plan = autobatch.find(
        model,
        sample(),
        loss_fn=F.cross_entropy,
        optimizer=optimizer,
        device="cuda",
        memory_budget=2 * GIB,
        tolerance=0,
        precision=precision,
    )
    assert state(model, optimizer) == before
    probes = {probe.batch_size: probe for probe in plan.probes if not probe.confirmation}
    assert probes[plan.batch_size].outcome is Outcome.FIT
    assert not probes[plan.batch_size + 1].outcome.fits
    assert plan.exact
    assert plan.peak_reserved is not None
    assert plan.peak_reserved <= plan.cap


def test_a_worker_gives_the_same_answer_within_the_tolerance() -> None:
    arguments: dict[str, Any] = {
        "loss_fn": F.cross_entropy,
        "optimizer": torch.optim.AdamW,
        "device": "cuda",
        "memory_budget": 2 * GIB,
        "tolerance": 0,
    }
    here = autobatch.find(network(), sample(), **arguments)
    there = autobatch.find(network(), sample(), isolate=True, **arguments)
    assert there.batch_size == pytest.approx(here.batch_size, rel=0.02)


def test_the_cap_makes_the_allocator_fail_and_is_put_back() -> None:
    device = CudaDevice(0)
    before = torch.cuda.get_per_process_memory_fraction() if hasattr(torch.cuda, "get_per_process_memory_fraction") else None
    torch.cuda.empty_cache()
    with pytest.raises(torch.OutOfMemoryError) as caught, device.cap(256 * MIB, 0):
        torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
    assert device.classify(caught.value) is Outcome.OOM
    torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
    if before is not None:
        assert torch.cuda.get_per_process_memory_fraction() == before


def test_memory_comes_back_after_a_trial_that_ran_out() -> None:
    model = network()
    before = torch.cuda.memory_allocated()
    plan = autobatch.find(
        model, sample(), loss_fn=F.cross_entropy, optimizer=torch.optim.SGD, device="cuda", memory_budget=GIB, tolerance=0
    )
    assert any(not probe.outcome.fits for probe in plan.probes)
    assert torch.cuda.memory_allocated() - before < 16 * MIB  # workspaces that libraries keep
    assert [note for note in plan.notes if "left" in note and "behind" in note] == []


def test_nothing_fits_names_what_there_is() -> None:
    with pytest.raises(NoBatchSizeFits, match="Not even batch size 1 fits: a trial may use"):
        autobatch.find(network(), sample(), loss_fn=F.cross_entropy, device="cuda", memory_budget=8 * MIB)


def test_the_whole_card_is_read_alike_by_driver_and_torch() -> None:
    reading = CudaDevice(0).memory()
    free, total = torch.cuda.mem_get_info()
    assert reading.capacity == total
    assert reading.free == pytest.approx(free, rel=0.02)
