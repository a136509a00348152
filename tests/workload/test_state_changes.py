"""What a training step may change, a row each: everything is put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from busy import Busy, busiest, look
from picture import differences
from torch import nn

from autobatch.workload.state import Snapshot

CPU = torch.device("cpu")


def forward_hook(model: Busy, _: Any) -> None:
    model.register_forward_hook(lambda *_: None)


def backward_hook(model: Busy, _: Any) -> None:
    model.second.register_full_backward_hook(lambda *_: None)


def tensor_hook(model: Busy, _: Any) -> None:
    model.second.bias.register_hook(lambda gradient: gradient)
    model.norm.bias.register_post_accumulate_grad_hook(lambda parameter: None)


def optimizer_hook(_: Busy, optimizer: torch.optim.Optimizer) -> None:
    optimizer.register_step_pre_hook(lambda *_: None)


def lists(model: Busy, _: Any) -> None:
    model.means[0].add_(1)
    model.means.append(torch.ones(1))
    model.table["late"] = model.table.pop("early")
    model.deque.append(4)
    model.set.add(3)
    model.array += 1
    model.bytes += b"x"


def objects(model: Busy, _: Any) -> None:
    model.helper.count += 1
    model.helper.shadow[0].zero_()
    model.slotted.count += 1
    model.slotted.late = 3


def closure(model: Busy, _: Any) -> None:
    model.count()
    model.count.asked = True


def generators(model: Busy, _: Any) -> None:
    torch.rand((), generator=model.generator)
    model.python.random()
    model.numpy.random()
    model.old_numpy.rand()


def average(model: Busy, _: Any) -> None:
    model.average.update_parameters(model.frozen)


def swapped(model: Busy, _: Any) -> None:
    model.second.bias.data = torch.ones(3)
    model.mean.data = torch.ones(2, dtype=torch.float64)


def replaced(model: Busy, _: Any) -> None:
    model.second.weight = nn.Parameter(torch.ones(6, 6))
    model.frozen = nn.Identity()
    del model.norm


def parametrized(model: Busy, _: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.second)
    nn.utils.parametrize.remove_parametrizations(model.first, "weight")


def graph(model: Busy, _: Any) -> None:
    model.mean.add_(model.second.bias)  # the buffer becomes part of a graph


def overlapping(model: Busy, _: Any) -> None:
    model.expanded.data_ptr()
    model.expanded[:1] = 9
    model.slice[0] = 9
    model.conjugate._base.mul_(2)


def frozen_in_inference(model: Busy, _: Any) -> None:
    with torch.inference_mode():
        model.inferred.add_(1)


def sparse(model: Busy, _: Any) -> None:
    model.sparse._values().add_(1)


def gradient_of_a_buffer(model: Busy, _: Any) -> None:
    (model.learned * 2).sum().backward()


def unregistered(model: Busy, _: Any) -> None:
    model.teachers[0].weight.data.add_(1)
    model.teachers[0].eval()
    model.teachers[0](torch.ones(1, 6)).sum().backward()


def state_is_lost(_: Busy, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def state_is_replaced(_: Busy, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state = type(optimizer.state)(dict)
    optimizer.defaults = {}


def nested_state(model: Busy, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model.second.bias]["history"][0].add_(1)
    optimizer.state[model.second.bias]["history"].append(torch.ones(1))


def groups(model: Busy, optimizer: torch.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[0]["lr"] = 7.0


def step_is_wrapped(_: Busy, optimizer: torch.optim.Optimizer) -> None:
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def parameters_elsewhere(_: Busy, optimizer: torch.optim.Optimizer) -> None:
    foreign = optimizer.param_groups[0]["params"][-1]
    (foreign * 2).sum().backward()
    foreign.data.add_(1)


CHANGES = [
    *(forward_hook, backward_hook, tensor_hook, optimizer_hook, lists, objects, closure, generators, average, swapped, replaced),
    *(parametrized, graph, overlapping, frozen_in_inference, sparse, gradient_of_a_buffer, unregistered, state_is_lost),
    *(state_is_replaced, nested_state, groups, step_is_wrapped, parameters_elsewhere),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_step_may_change_is_put_back(change: Callable[[Busy, torch.optim.Optimizer], None]) -> None:
    model, optimizer, hidden = busiest()
    before = look(model, optimizer, hidden)
    snapshot = Snapshot(model, optimizer, CPU)
    change(model, optimizer)
    snapshot.restore()
    assert differences(before, look(model, optimizer, hidden)) == {}
