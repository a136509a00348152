"""``autobatch.find`` and ``autobatch.search`` as a user calls them, on real CPU memory."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch import BatchPlan, InvalidRequest, NoBatchSizeFits, Outcome, Probe, Trying
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
    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.numpy().tobytes(), value.shape, value.device
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return {
        "model": plain(dict(model.state_dict())),
        "objects": [id(p) for p in model.parameters()],
        "optimizer": plain(optimizer.state_dict()),
        "grads": [plain(p.grad) for p in model.parameters()],
        "wanted": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "random": (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()),
    }


def trained(kind: type[torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model in the middle of training: optimizer state, gradients, a part in eval mode and a frozen weight."""
    model = network()
    optimizer = kind(model.parameters(), lr=0.01)
    for _ in range(2):
        F.cross_entropy(model(X), Y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    return model, optimizer


def test_the_answer_was_run_fits_and_the_next_size_does_not() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = state(model, optimizer)
    plan = find(model, optimizer=optimizer, tolerance=0)
    assert state(model, optimizer) == before
    probes = {(p.batch_size, p.confirmation): p for p in plan.probes}
    assert probes[plan.batch_size, True].outcome.fits
    assert probes[plan.batch_size, True].steps > probes[plan.batch_size, False].steps
    assert probes[plan.batch_size + 1, False].outcome is Outcome.OOM
    assert "can't allocate memory" in probes[plan.batch_size + 1, False].message
    assert (plan.exact, plan.limited_by, plan.wall, plan.wall_kind) == (True, "memory", plan.batch_size + 1, "probed")
    assert (plan.evidence, plan.budget, plan.device) == ("measured", 192 * MIB, "cpu")
    assert plan.peak_allocated is not None
    assert 0.9 * plan.cap <= plan.peak_allocated <= plan.cap
    assert plan.lr == pytest.approx(0.1 * plan.batch_size / 256)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("isolate", [False, True])
def test_everything_is_bit_for_bit_what_it_was(kind: type[torch.optim.Optimizer], isolate: bool) -> None:
    model, optimizer = trained(kind)
    before = state(model, optimizer)
    plan = find(model, optimizer=optimizer, max_batch_size=16, isolate=isolate)
    assert (plan.batch_size, plan.limited_by) == (16, "max_batch_size")
    assert state(model, optimizer) == before


class AtFour(nn.Module):
    error: type[BaseException] = KeyboardInterrupt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) >= 4:
            raise self.error("at four")
        return x


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_state_comes_back_after_an_interrupt_and_after_a_fault(error: type[BaseException]) -> None:
    inner, _ = trained(torch.optim.AdamW)
    model = nn.Sequential(AtFour(), inner)
    optimizer = torch.optim.AdamW(model.parameters())
    before = state(model, optimizer)
    AtFour.error = error
    with pytest.raises(error, match="at four"):
        find(model, optimizer=optimizer, isolate=False)
    assert state(model, optimizer) == before


@pytest.mark.parametrize("isolate", [False, None])
def test_a_fault_of_the_model_comes_out_as_it_is_and_is_never_taken_for_memory(isolate: bool | None) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(7, 2))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied") as caught:
        find(model, isolate=isolate)
    assert "at batch size 1; it is not about memory" in caught.value.__notes__[0]
    if isolate is None:
        assert "nn/modules/linear.py" in str(caught.value.__cause__)


def test_nothing_fits_in_real_memory() -> None:
    with pytest.raises(NoBatchSizeFits) as caught:
        find(nn.Sequential(nn.Flatten(), nn.Linear(768, 100_000)), memory_budget="256MiB", optimizer=torch.optim.AdamW)
    assert caught.value.available == int(256 * MIB * 0.95)
    assert str(caught.value).startswith(
        "Not even batch size 1 fits: a trial may use 243.2 MiB (budget 256.0 MiB less the margin of 5%) on cpu and it needs more than 29"
    )
    assert "raise --memory-budget (memory_budget=)" in str(caught.value)


def test_a_data_set_caps_the_batch_and_gives_the_iterations() -> None:
    data = TensorDataset(torch.randn(100, 3, 16, 16), torch.randint(0, 10, (100,)))
    plan = find(network(), sample=DataLoader(data, batch_size=20), epochs=3, max_batch_size=30)
    assert (plan.batch_size, plan.limited_by, plan.dataset_size) == (30, "max_batch_size", 100)
    assert (plan.steps_per_epoch, plan.total_steps, plan.last_batch_size) == (4, 12, 10)
    assert "the data set's first 20 rows were repeated to fill each batch" in plan.notes


def test_batch_normalisation_that_needs_two_rows_starts_at_two() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    for isolate in (False, True):
        plan = find(model, sample=(torch.randn(4, 8), torch.randint(8, (4,))), max_batch_size=4, isolate=isolate)
        assert plan.batch_size == 4
        assert min(probe.batch_size for probe in plan.probes) == 2
        assert "batch size 1 was left out: the model's batch normalisation needs at least two rows in training" in plan.notes


def test_what_cannot_be_sent_to_a_worker_says_what_to_do() -> None:
    model = network()
    model.lock = threading.Lock()
    with pytest.raises(
        InvalidRequest, match=r"cannot be sent to a worker process \(TypeError: .*lock.*isolate=False, or .* autobatch probe"
    ):
        find(model)
    assert find(model, isolate=False, max_batch_size=2).batch_size == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"margin": 1.0}, InvalidRequest, "margin is 1.0"),
        ({"memory_budget": "20GB"}, InvalidRequest, "Write 20GiB"),
        ({"memory_budget": "100TiB"}, InvalidRequest, "100.00 TiB is more than the device has"),
        ({"device": "cuda:7"}, autobatch.DeviceUnavailable, "CUDA"),
        ({"device": "gpu"}, autobatch.DeviceUnavailable, "'gpu' is no device. Known here: cuda"),
        ({"device": "mps"}, autobatch.DeviceUnavailable, "cannot hold 'mps' memory to a limit"),
        ({"sample": (X, Y[:3])}, InvalidRequest, r"sample\[1\] has 3 rows but sample\[0\] has 16"),
        ({"sample": (X[:0], Y[:0])}, InvalidRequest, "The sample is empty"),
        ({"sample": {"text": "no tensor"}}, InvalidRequest, "holds no tensor"),
        ({"sample": None}, InvalidRequest, "No sample given"),
        (
            {"loss_fn": lambda out, target: out},
            autobatch.WorkloadFailed,
            r"loss_fn returned a tensor of shape \(1, 10\); a scalar is wanted",
        ),
        ({"loss_fn": lambda out, target: out.sum().detach()}, autobatch.WorkloadFailed, "needs no gradient"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())}, InvalidRequest, "belongs to the model: it was built for another"),
        ({"optimizer": "sgd"}, InvalidRequest, "optimizer is a str"),
        ({"precision": "int8"}, InvalidRequest, "precision is 'int8'; known: fp32, bf16, fp16"),
        ({"lr_rule": "cubic"}, InvalidRequest, "lr_rule is 'cubic'"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model, events = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = state(model, optimizer)
    with pytest.raises(error, match=message):
        find(model, progress=events.append, **{"optimizer": optimizer, "isolate": False, **arguments})
    assert [event for event in events if isinstance(event, Probe)] == []
    assert len([event for event in events if isinstance(event, Trying)]) <= 1
    assert state(model, optimizer) == before


def test_search_finds_the_largest_size_that_does_not_raise() -> None:
    seen: list[Probe] = []

    def run(batch_size: int) -> None:
        if batch_size > 77:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")

    assert autobatch.search(run, tolerance=0, progress=seen.append) == 77
    assert [probe.batch_size for probe in seen] == [1, 2, 4, 8, 16, 32, 64, 128, 96, 80, 72, 76, 78, 77]
    assert autobatch.search(run, max_batch_size=64) == 64
    assert autobatch.search(lambda size: torch.empty(size, 2**62) if size > 5 else None, tolerance=0) == 5


def test_search_leaves_other_errors_alone() -> None:
    with pytest.raises(ZeroDivisionError):
        autobatch.search(lambda size: 1 // 0)
    with pytest.raises(NoBatchSizeFits, match=r"Not even batch size 4 fits: MemoryError\. Next: look for what else holds memory"):
        autobatch.search(lambda size: (_ for _ in ()).throw(MemoryError()), min_batch_size=4)
