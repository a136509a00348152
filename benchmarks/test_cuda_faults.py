"""Faults that only a real card has, and long runs at the answer.

scripts/bench --cuda --faults
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import autobatch
from autobatch import Outcome, Probe
from autobatch.core.units import GIB, MIB
from autobatch.devices.cuda import CudaDevice
from autobatch.probe.inline import InlineProber
from autobatch.workload.workload import build_workload
from benchmarks.cuda_models import MODELS, OPTIMIZERS
from benchmarks.soak import soak

pytestmark = pytest.mark.cuda

NEIGHBOUR = (
    "import sys, torch; taken = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device='cuda'); torch.cuda.synchronize(); "
    "print(flush=True); sys.stdin.read()"
)


def beyond_its_table(model: nn.Module, batch: Tensor) -> Tensor:
    """Return a loss; from 64 rows on, a token lies outside the table."""
    tokens = torch.full((len(batch),), 10 if len(batch) < 64 else 10**6, device=batch.device)
    return F.embedding(tokens, model.weight).sum()  # type: ignore[arg-type]


def beyond_32_bits(model: nn.Module, batch: Tensor) -> Tensor:
    """Return a loss; from 128 rows on, a tensor has more elements than 32 bits can count."""
    images = batch[:, :1].view(-1, 1, 1, 1).expand(-1, 1, 4096, 4096).to(torch.float16)
    pooled = F.interpolate(images, scale_factor=0.5, mode="bicubic")
    return pooled.mean() + model.weight.sum()  # type: ignore[operator]


def verdicts(plan: Any) -> list[list[Any]]:
    return [[probe.batch_size, probe.outcome.value, probe.message[:120]] for probe in plan.probes]


@pytest.mark.parametrize("step", [beyond_its_table, beyond_32_bits], ids=lambda step: step.__name__)
def test_a_worker_survives_what_breaks_a_process(step: Any, record: list[dict[str, Any]]) -> None:
    plan = autobatch.find(nn.Linear(8, 16), torch.ones(1, 8), step=step, device="cuda", isolate=True, max_batch_size=512, tolerance=0)
    torch.ones(1, device="cuda").add(1).sum().item()  # this process can still use the card
    record.append({"check": step.__name__, "batch size": plan.batch_size, "limited by": plan.limited_by, "probes": verdicts(plan)})
    assert plan.probes[-1].outcome is Outcome.FIT
    if step is beyond_its_table:
        assert (plan.batch_size, plan.limited_by) == (63, "crash")


@pytest.fixture
def neighbour() -> Iterator[list[subprocess.Popen[bytes]]]:
    """A process that holds memory on the card once it is started, ended after the test."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_a_neighbour_that_takes_10_gib_during_the_search(neighbour: list[Any], record: list[dict[str, Any]]) -> None:
    def come(event: object) -> None:
        if isinstance(event, Probe) and not neighbour:
            command = [sys.executable, "-c", NEIGHBOUR, str(10 * GIB)]
            neighbour.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            neighbour[0].stdout.readline()

    model, sample = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096)), torch.ones(1, 4096)
    margin = 0.5 * 10 * GIB / torch.cuda.mem_get_info()[0]  # the neighbour takes twice what the margin has
    plan = autobatch.find(model, sample, optimizer=torch.optim.AdamW, device="cuda", margin=margin, max_batch_size=2**24, progress=come)
    told = [note for note in plan.notes if note.startswith("during the search the memory that can be had fell")]
    record.append({"check": "neighbour", "batch size": plan.batch_size, "notes": told, "probes": verdicts(plan)})
    assert len(told) == 1
    assert plan.probes[-1].outcome is Outcome.FIT
    assert plan.cap <= plan.budget <= torch.cuda.mem_get_info()[1] - 10 * GIB


def test_fifty_failed_trials_leave_nothing_allocated(record: list[dict[str, Any]]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    model(torch.ones(2, 3, 64, 64))
    work = build_workload(model, torch.ones(1, 3, 64, 64), optimizer=torch.optim.AdamW)
    prober = InlineProber(work, CudaDevice(0), memory_budget=GIB, margin=0.0)
    try:
        assert prober.probe(2).outcome is Outcome.FIT
        held = []
        for _ in range(50):
            assert prober.probe(100_000).outcome is Outcome.OOM
            held.append(torch.cuda.memory_allocated())
    finally:
        prober.close()
    record.append({"check": "leaks", "bytes after each of 50 failed trials": sorted(set(held))})
    assert max(held) - held[0] < MIB


class Rows(Dataset[Any]):
    """Random rows like a sample's, made when they are asked for."""

    def __init__(self, sample: dict[str, Tensor]) -> None:
        self._sample = sample

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index % len(value)] for name, value in self._sample.items()}


@pytest.mark.parametrize("name", ["resnet50", "gpt2"])
def test_a_thousand_steps_at_the_answer(name: str, record: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    model, sample = MODELS[name]()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    plan = autobatch.find(model, sample, optimizer=optimizer, device="cuda", memory_budget=8 * GIB)
    done = soak(model, optimizer, lambda net, batch: net(**batch)["loss"], Rows(sample), plan, CudaDevice(0))
    record.append({"check": "soak", "model": name, **vars(done)})
    model.cpu()
    gc.collect()
    torch.cuda.empty_cache()
    assert (done.steps, done.error) == (1000, "")
