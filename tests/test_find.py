"""``autobatch.find`` in this process, on real CPU memory."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import autobatch
from autobatch import BatchPlan, NoBatchSizeFits, Probe, Setting, Trying
from autobatch.core.units import MIB

X, Y = torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16 * 16, 10),
    )


def find(model: nn.Module, **arguments: Any) -> BatchPlan:
    blank = {"loss_fn": F.cross_entropy, "device": "cpu", "memory_budget": 192 * MIB}
    return autobatch.find(model, arguments.pop("sample", (X, Y)), **{**blank, **arguments})


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()},
        "optimizer": repr(optimizer.state_dict()),
        "grads": [p.grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "random": (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()),
    }


def test_the_answer_was_run_fits_and_the_next_size_does_not() -> None:
    events: list[Any] = []
    plan = find(network(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), tolerance=0, progress=events.append)
    probes = {(p.batch_size, p.confirmation): p for p in plan.probes}
    assert probes[plan.batch_size, True].outcome.fits
    assert probes[plan.batch_size, True].steps > probes[plan.batch_size, False].steps
    assert probes[plan.batch_size + 1, False].outcome is autobatch.Outcome.OOM
    assert (plan.exact, plan.limited_by, plan.wall, plan.wall_kind) == (True, "memory", plan.batch_size + 1, "probed")
    assert plan.evidence == "measured"
    assert plan.budget == 192 * MIB
    assert plan.peak_allocated is not None
    assert plan.peak_allocated <= plan.cap
    assert plan.lr == pytest.approx(0.1 * plan.batch_size / 256)
    assert isinstance(events[0], Setting)
    assert [type(event) for event in events[1:]] == [Trying, Probe] * len(plan.probes)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_everything_is_bit_for_bit_what_it_was(kind: type[torch.optim.Optimizer]) -> None:
    model = network()
    model[3].eval()
    optimizer = kind(model.parameters(), lr=0.01)
    before = state(model, optimizer)
    find(model, optimizer=optimizer)
    assert state(model, optimizer) == before


def test_state_comes_back_after_an_interrupt_and_after_a_fault_of_the_model() -> None:
    class Stop(nn.Module):
        error: type[BaseException] = KeyboardInterrupt

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) >= 4:
                raise self.error("at four")
            return x

    model = nn.Sequential(Stop(), network())
    optimizer = torch.optim.AdamW(model.parameters())
    before = state(model, optimizer)
    with pytest.raises(KeyboardInterrupt):
        find(model, optimizer=optimizer)
    assert state(model, optimizer) == before
    Stop.error = RuntimeError
    with pytest.raises(RuntimeError, match="at four"):
        find(model, optimizer=optimizer)
    assert state(model, optimizer) == before


def test_a_fault_at_batch_one_is_never_taken_for_memory() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(7, 2))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied") as caught:
        find(model)
    assert "at batch size 1" in caught.value.__notes__[0]


def test_nothing_fits_says_what_is_needed_and_what_there_is() -> None:
    with pytest.raises(NoBatchSizeFits) as caught:
        find(nn.Sequential(nn.Flatten(), nn.Linear(768, 100_000)), memory_budget="256MiB", optimizer=torch.optim.AdamW)
    assert caught.value.available == int(256 * MIB * 0.95)
    assert str(caught.value).startswith(
        "Not even batch size 1 fits: a trial may use 243.2 MiB (budget 256.0 MiB less the margin of 5%) on cpu and it needs more than 29"
    )
    assert "raise --memory-budget (memory_budget=)" in str(caught.value)


def test_the_data_set_caps_the_batch_and_gives_the_iterations() -> None:
    data = TensorDataset(torch.randn(100, 3, 16, 16), torch.randint(0, 10, (100,)))
    plan = find(network(), sample=data, epochs=3)
    assert (plan.batch_size, plan.limited_by, plan.dataset_size) == (100, "dataset", 100)
    assert (plan.steps_per_epoch, plan.total_steps) == (1, 3)
    plan = find(network(), sample=data, max_batch_size=30, epochs=3)
    assert (plan.batch_size, plan.limited_by) == (30, "max_batch_size")
    assert (plan.steps_per_epoch, plan.total_steps, plan.last_batch_size) == (4, 12, 10)


def test_a_global_batch_is_shared_out_equally_and_the_share_is_run() -> None:
    plan = find(network(), global_batch_size=128, max_batch_size=65)
    assert (plan.batch_size, plan.accumulation_steps, plan.global_batch_size) == (64, 2, 128)
    assert plan.probes[-1].batch_size == 64
    assert plan.probes[-1].confirmation
    plan = find(network(), global_batch_size=16)
    assert (plan.batch_size, plan.accumulation_steps, plan.limited_by) == (16, 1, "global_batch_size")


def test_multiples_are_kept() -> None:
    plan = find(network(), multiple_of=8)
    assert plan.batch_size % 8 == 0
    assert {probe.batch_size % 8 for probe in plan.probes} == {0}


def test_throughput_returns_a_size_that_was_run() -> None:
    plan = find(network(), objective="throughput", max_batch_size=64)
    assert plan.batch_size in {probe.batch_size for probe in plan.probes if not probe.confirmation}
    assert plan.limited_by in ("throughput", "max_batch_size")


def test_a_time_limit_returns_what_was_proven_by_then() -> None:
    plan = find(network(), time_limit=1e-6)
    assert (plan.batch_size, plan.limited_by, plan.exact) == (1, "time_limit", False)
    assert plan.probes[-1].confirmation


def test_a_confirmation_that_does_not_fit_sends_the_search_below() -> None:
    """A step that needs more from the fourth time on, as fragmentation or a cache would make it."""

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(MIB // 4))
            self.runs = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.runs = self.runs + 1 if self.last == len(x) else 1
            self.last = len(x)
            extra = torch.ones(len(x), MIB // 4) if self.runs > 3 else torch.ones(1)
            return (x * self.weight).square().mean() + extra.sum() * 0

        last = 0

    plan = autobatch.find(
        Growing(), torch.ones(1, 1), step=lambda net, batch: net(batch), device="cpu", memory_budget=128 * MIB, tolerance=0
    )
    confirmations = [probe for probe in plan.probes if probe.confirmation]
    assert len(confirmations) > 1
    assert [probe.outcome.fits for probe in confirmations] == [False] * (len(confirmations) - 1) + [True]
    assert confirmations[-1].batch_size == plan.batch_size
    assert plan.wall is not None
    assert plan.batch_size < plan.wall <= confirmations[0].batch_size


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"min_batch_size": 0}, autobatch.InvalidRequest, "min_batch_size is 0; a batch has at least one row"),
        ({"max_batch_size": -3}, autobatch.InvalidRequest, "max_batch_size is -3"),
        ({"min_batch_size": 9, "max_batch_size": 8}, autobatch.InvalidRequest, "min_batch_size 9 is above max_batch_size 8"),
        ({"multiple_of": 64, "max_batch_size": 32}, autobatch.InvalidRequest, "No multiple of 64 lies between 1 and 32"),
        ({"steps": 1}, autobatch.InvalidRequest, "steps is 1; 2 or more are needed"),
        ({"tolerance": 1.0}, autobatch.InvalidRequest, "tolerance is 1.0"),
        ({"time_limit": 0}, autobatch.InvalidRequest, "time_limit is 0"),
        ({"margin": 1.0}, autobatch.InvalidRequest, "margin"),
        ({"memory_budget": "20GB"}, autobatch.InvalidRequest, "Write 20GiB"),
        ({"memory_budget": "100TiB"}, autobatch.InvalidRequest, "100.00 TiB"),
        ({"device": "cuda:7"}, autobatch.DeviceUnavailable, "CUDA|cuda"),
        ({"device": "gpu"}, autobatch.DeviceUnavailable, "'gpu' is no device. Known here: cuda"),
        ({"device": "mps"}, autobatch.DeviceUnavailable, "cannot hold 'mps' memory to a limit"),
        ({"base_lr": float("nan")}, autobatch.InvalidRequest, "base_lr is nan"),
        ({"lr_rule": "cubic"}, autobatch.InvalidRequest, "cubic"),
        ({"objective": "speed"}, autobatch.InvalidRequest, "objective is 'speed'"),
    ],
)
def test_bad_input_is_named_before_anything_runs(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model, events = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = state(model, optimizer)
    with pytest.raises(error, match=message):
        find(model, optimizer=optimizer, progress=events.append, **arguments)
    assert [event for event in events if isinstance(event, Trying)] == []
    assert state(model, optimizer) == before
