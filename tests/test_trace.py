"""The trace on fake tensors, held against the real CPU allocator."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from autobatch.core.units import MIB
from autobatch.examples import gpt
from autobatch.simulate.affine import AffineTrace, NotAffine, completes, smallest_capacity
from autobatch.simulate.cpu_temporaries import cpu_temporaries
from autobatch.simulate.recorder import Trace
from autobatch.simulate.trace import Manner, trace_step
from autobatch.workload.workload import Workload, build_workload


def traced(work: Workload, batch_size: int) -> Trace:
    return trace_step(work, batch_size)


def real_peak(work: Workload, batch_size: int) -> int:
    """Return the bytes that two real iterations ask of the CPU allocator at the highest point, what was there before included."""
    assert work.optimizer is not None
    resident = sum(t.untyped_storage().nbytes() for t in [*work.model.parameters(), *work.model.buffers()])
    batches = [work.make_batch(batch_size) for _ in range(2)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        for host in batches:
            batch = [leaf.clone() for leaf in host]
            loss, output = work.loss(work.model, batch)
            assert loss is not None
            loss.backward()  # type: ignore[no-untyped-call]
            work.optimizer.step()
            work.model.zero_grad(set_to_none=True)
    now = highest = 0
    for event in prof.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    del output, batch
    return resident + highest


def tiny_gpt(optimizer: Any) -> Workload:
    arguments = gpt.build()
    return build_workload(arguments["model"], arguments["sample"], loss_fn=arguments["loss_fn"], optimizer=optimizer)


def mlp(optimizer: Any) -> Workload:
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.LayerNorm(512), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return build_workload(model, (torch.randn(4, 64), torch.randint(10, (4,))), loss_fn=F.cross_entropy, optimizer=optimizer)


def convolutional(optimizer: Any) -> Workload:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    return build_workload(model, (torch.randn(4, 3, 24, 24), torch.randint(10, (4,))), loss_fn=F.cross_entropy, optimizer=optimizer)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("build", [tiny_gpt, mlp])
def test_matmul_models_ask_for_what_the_real_allocator_gave_to_a_thousandth(build: Any, optimizer: Any) -> None:
    for batch_size in (8, 16):
        predicted = traced(build(optimizer), batch_size).peak()
        assert predicted == pytest.approx(real_peak(build(optimizer), batch_size), rel=0.001)


def pyramid(optimizer: Any) -> Workload:
    def block(into: int, out: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())

    model = nn.Sequential(
        block(3, 24), block(24, 40, 2), block(40, 80), block(80, 80), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(80, 10)
    )
    return build_workload(model, (torch.randn(2, 3, 40, 40), torch.randint(10, (2,))), loss_fn=F.cross_entropy, optimizer=optimizer)


def plain(optimizer: Any) -> Workload:
    layers: list[nn.Module] = []
    for into, out in ((3, 64), (64, 64), (64, 128)):
        layers += [nn.Conv2d(into, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Conv2d(128, 128, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128 * 16, 10))
    return build_workload(model, (torch.randn(2, 3, 32, 32), torch.randint(10, (2,))), loss_fn=F.cross_entropy, optimizer=optimizer)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("build", [convolutional, pyramid, plain])
def test_convolutional_models_ask_for_what_the_real_allocator_gave_to_a_hundredth(build: Any, optimizer: Any) -> None:
    """With what oneDNN takes inside a convolution, up to a fifth of the peak."""
    for batch_size in (32, 64):
        predicted = trace_step(build(optimizer), batch_size, Manner(temporaries=cpu_temporaries)).peak()
        assert predicted == pytest.approx(real_peak(build(optimizer), batch_size), rel=0.01)
        assert predicted >= traced(build(optimizer), batch_size).peak()


def test_nothing_of_the_original_changes() -> None:
    work = mlp(adamw)
    before = {name: tensor.numpy().tobytes() for name, tensor in work.model.state_dict().items()}
    states = random.getstate(), torch.get_rng_state().tolist()
    traced(work, 4)
    assert {name: tensor.numpy().tobytes() for name, tensor in work.model.state_dict().items()} == before
    assert all(p.grad is None for p in work.model.parameters())
    assert work.optimizer is not None
    assert work.optimizer.state == {}
    assert (random.getstate(), torch.get_rng_state().tolist()) == states


def test_every_storage_is_told_by_what_it_is_there_for() -> None:
    trace = traced(mlp(adamw), 8)
    bytes_of = {tag: sum(s.size for s in trace.storages if s.tag == tag) for tag in {s.tag for s in trace.storages}}
    parameters = sum(p.numel() * 4 for p in mlp(adamw).model.parameters())
    assert bytes_of["parameter"] == parameters
    assert bytes_of["gradient"] == 2 * parameters  # one set in each iteration
    assert bytes_of["optimizer state"] == pytest.approx(2 * parameters, rel=0.001)
    assert bytes_of["input"] == 2 * (8 * 64 * 4 + 8 * 8)
    hidden = {s.module for s in trace.storages if s.operator == "aten.gelu"}
    assert hidden == {"1"}


def test_any_batch_size_follows_from_two_traces() -> None:
    work = mlp(sgd)
    line = AffineTrace.through(traced(work, 3), traced(work, 8), traced(work, 5))
    for batch_size in (1, 4, 13, 200):
        assert line.peak(batch_size) == traced(work, batch_size).peak()


def test_a_step_that_changes_with_the_batch_is_not_affine() -> None:
    def quadratic(model: nn.Module, batch: Any) -> torch.Tensor:
        hidden = model(batch[0])
        return (hidden @ hidden.T).square().mean()

    def branching(model: nn.Module, batch: Any) -> torch.Tensor:
        loss = model(batch[0]).square().mean()
        return loss + loss if len(batch[0]) > 4 else loss

    for step in (quadratic, branching):
        work = build_workload(nn.Linear(4, 4), (torch.randn(2, 4), torch.zeros(2)), step=step)
        with pytest.raises(NotAffine):
            AffineTrace.through(traced(work, 3), traced(work, 8), traced(work, 5))


def test_the_smallest_capacity_completes_and_less_does_not() -> None:
    work = tiny_gpt(adamw)
    line = AffineTrace.through(traced(work, 2), traced(work, 4), traced(work, 3))
    for batch_size in (1, 16):
        sizes = line.sizes(batch_size)
        least = smallest_capacity(line.events, sizes)
        assert line.peak(batch_size) <= least
        assert completes(line.events, sizes, least)
        assert not completes(line.events, sizes, least - 2 * MIB)


def test_a_model_larger_than_memory_is_traced_without_being_made() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = nn.Sequential(*(nn.Linear(32768, 32768, bias=False) for _ in range(8)))  # 32 GiB
    work = build_workload(model, torch.randn(2, 32768), optimizer=sgd)
    trace = traced(work, 2)
    assert trace.peak() > 3 * 8 * 32768**2 * 4
