from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from busy import Busy, train
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import autobatch
from autobatch import InvalidRequest
from autobatch.workload.state import Snapshot, keep_random_state, resident_bytes

CPU = torch.device("cpu")


def picture(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return every byte of state, with the identity of the objects that a user may hold."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), "plain": model.plain}
    return {
        "bytes": {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()},
        "same": {name: (id(tensor), tensor.data_ptr(), tensor.requires_grad) for name, tensor in tensors.items()},
        "grads": {name: None if p.grad is None else (id(p.grad), p.grad.numpy().tobytes()) for name, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "calls": model.calls,
        "optimizer": repr(optimizer.state_dict()),
        "state": {id(p): {k: id(v) for k, v in state.items() if isinstance(v, torch.Tensor)} for p, state in optimizer.state.items()},
    }


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, lambda p: torch.optim.SGD(p, momentum=0.9)])
@pytest.mark.parametrize("resumed", [False, True])
def test_every_byte_and_every_object_comes_back(kind: Callable[..., torch.optim.Optimizer], resumed: bool) -> None:
    torch.manual_seed(0)
    model = Busy()
    optimizer = kind(model.parameters())
    if resumed:
        train(model, optimizer)
    model.second.eval()
    before = picture(model, optimizer)
    snapshot = Snapshot(model, optimizer, CPU)
    model.train()
    train(model, optimizer)
    optimizer.param_groups[0]["lr"] = 99.0
    model.frozen.weight.requires_grad_(True)
    model.first.weight_seen = torch.zeros(3)
    snapshot.restore()
    assert picture(model, optimizer) == before


def test_gradients_that_were_there_come_back_as_the_same_tensors() -> None:
    model = nn.Linear(2, 2)
    model.weight.grad = gradient = torch.ones(2, 2)
    snapshot = Snapshot(model, None, CPU)
    assert model.weight.grad is None
    model(torch.ones(1, 2)).sum().backward()
    snapshot.restore()
    assert model.weight.grad is gradient
    assert gradient.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert model.bias.grad is None


def test_dropping_keeps_the_state_of_a_resumed_optimizer() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    model.bias.grad = None
    optimizer.step()
    snapshot = Snapshot(model, optimizer, CPU)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert set(optimizer.state) == {model.weight, model.bias}
    snapshot.drop_created()
    assert set(optimizer.state) == {model.weight}
    assert model.weight.grad is None
    snapshot.restore()
    assert float(optimizer.state[model.weight]["step"]) == 1


def test_buffers_elsewhere_are_moved_for_the_trials_and_back() -> None:
    model = nn.BatchNorm1d(2, affine=False)
    before = [(id(t), t.data_ptr(), t.device.type) for t in model.buffers()]
    snapshot = Snapshot(model, None, torch.device("meta"))
    assert {t.device.type for t in model.buffers()} == {"meta"}
    snapshot.restore()
    assert [(id(t), t.data_ptr(), t.device.type) for t in model.buffers()] == before


def test_lazy_parameters_are_refused_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    model[0].weight.grad = gradient = torch.ones(2, 2)
    with pytest.raises(InvalidRequest, match="'1.weight' is not initialised yet"):
        Snapshot(model, None, CPU)
    assert model[0].weight.grad is gradient


def test_random_states_come_back_after_an_interrupt() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    with pytest.raises(KeyboardInterrupt), keep_random_state():
        first = draw()
        raise KeyboardInterrupt
    assert draw() == first


def test_resident_bytes_count_shared_storage_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert resident_bytes(model, None) == 2 * 64
    model[1].weight = model[0].weight
    assert resident_bytes(model, None) == 64
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert resident_bytes(model, optimizer) == 64 * 4 + 4  # weight, gradient, two moments and the step count


@pytest.mark.parametrize(
    ("tensor", "size"),
    [
        (torch.eye(4).to_sparse(), 4 * (4 + 16)),  # four numbers, and two places of eight bytes each
        (torch.ones(4, 4).to_mkldnn(), 64),
        (TwoTensor(torch.ones(2), torch.ones(3)[:2]), 8 + 12),
    ],
    ids=["sparse", "oneDNN", "two"],
)
def test_resident_bytes_of_tensors_that_have_no_storage_of_their_own(tensor: torch.Tensor, size: int) -> None:
    model = nn.Linear(2, 2, bias=False)
    model.register_buffer("other", tensor)
    assert resident_bytes(model, None) == 16 + size


def test_find_takes_a_model_with_a_sparse_buffer_and_puts_it_back() -> None:
    class Graph(nn.Linear):
        """A graph convolution over four nodes."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.edges._values().mul_(1.5)
            return super().forward(torch.sparse.mm(self.edges, x.flatten(1).T).T)

    model = Graph(4, 1)
    model.register_buffer("edges", torch.eye(4).to_sparse())
    plan = autobatch.find(model, torch.ones(1, 4), max_batch_size=2, memory_budget="64MiB", device="cpu", isolate=False)
    assert plan.batch_size == 2
    assert torch.equal(model.edges.to_dense(), torch.eye(4))


def test_memory_that_was_given_up_is_taken_again() -> None:
    model = nn.Module()
    model.plain = torch.arange(6.0)
    snapshot = Snapshot(model, None, CPU)
    model.plain.untyped_storage().resize_(0)
    model.plain.resize_(0)
    snapshot.restore()
    assert model.plain.tolist() == [0, 1, 2, 3, 4, 5]


def test_hooks_of_a_trial_do_not_run_afterwards() -> None:
    model, calls = nn.Linear(2, 2), []
    model.bias.register_hook(lambda gradient: calls.append("kept"))
    snapshot = Snapshot(model, None, CPU)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: calls.append("trial"))
        parameter.register_post_accumulate_grad_hook(lambda parameter: calls.append("trial"))
    snapshot.restore()
    model(torch.ones(1, 2)).sum().backward()
    assert calls == ["kept"]


def test_a_tensor_made_of_tensors_comes_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    two = nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)))
    model.register_parameter("two", two)
    snapshot = Snapshot(model, None, CPU)
    two.data.add_(1)
    model(torch.randn(4, 2)).sum().backward()
    snapshot.restore()
    assert model.two is two
    assert (two.a.tolist(), two.b.tolist()) == ([1, 1], [1, 1])
    assert (int(model[1].num_batches_tracked), model[1].running_mean.tolist()) == (0, [0, 0])
