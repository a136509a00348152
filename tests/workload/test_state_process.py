"""Switches, generators, interrupts, and what a step has closed over."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from busy import Helper, busiest, look, train
from picture import differences, everything
from torch import nn
from torch.optim import optimizer as optimizers

from autobatch.workload.flags import switches
from autobatch.workload.state import Snapshot, keep_random_state

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [name for name, read, _ in switches() if name != "current CUDA device" and not name.startswith("_")])
def test_every_switch_is_put_back(name: str) -> None:
    read, write = next((read, write) for known, read, write in switches() if known == name)
    before = read()
    values = {str: ("high", "ieee", "tf32", "auto"), int: (1, 0), bool: (not before,), torch.dtype: (torch.float64,)}
    others = {
        "default device": (torch.device("meta"),),
        "anomaly mode": ((True, False),),
        "deterministic algorithms": ((True, True),),
        "autocast nesting": (),
        "backends.quantized.engine": ("onednn", "qnnpack"),
    }
    snapshot = Snapshot(nn.Linear(1, 1), None, CPU)
    try:
        for value in others.get(name, values.get(type(before), ((True, torch.float64),))):
            with contextlib.suppress(RuntimeError, ValueError, TypeError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                write(value)
        if name == "autocast nesting":
            torch.autocast_increment_nesting()
    finally:
        snapshot.restore()
    assert read() == before


@pytest.mark.parametrize("outside", [0, 1])
def test_contexts_of_autocast_that_a_step_left_open_are_closed(outside: int) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(outside):
            stack.enter_context(torch.autocast("cpu"))
        snapshot = Snapshot(nn.Linear(1, 1), None, CPU)
        for _ in range(3):
            torch.autocast("cpu", dtype=torch.float16).__enter__()
        snapshot.restore()
        assert torch.autocast_increment_nesting() == outside + 1
        torch.autocast_decrement_nesting()
        assert (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")) == (bool(outside), torch.bfloat16)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="since torch 2.9 two switches set one precision")
def test_a_precision_that_torch_refuses_to_read_is_put_back() -> None:
    matmul = torch.backends.cuda.matmul
    usual = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        snapshot = Snapshot(nn.Linear(1, 1), None, CPU)
        matmul.fp32_precision = "ieee"
        snapshot.restore()
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = usual
    assert torch.get_float32_matmul_precision() == "highest"


def test_everything_is_put_back_from_another_thread_too() -> None:
    model, optimizer, hidden = busiest()
    before = look(model, optimizer, hidden)
    with keep_random_state():
        snapshot = Snapshot(model, optimizer, CPU)
        train(model, optimizer, 1)
    thread = threading.Thread(target=snapshot.restore)
    thread.start()
    thread.join()
    assert differences(before, look(model, optimizer, hidden)) == {}


def test_hooks_on_every_module_are_put_back() -> None:
    snapshot = Snapshot(nn.Linear(1, 1), None, CPU)
    nn.modules.module.register_module_forward_hook(lambda *_: None)
    optimizers.register_optimizer_step_pre_hook(lambda *_: None)
    snapshot.restore()
    assert not nn.modules.module._global_forward_hooks
    assert not optimizers._global_optimizer_pre_hooks


@pytest.mark.parametrize("after", range(1, 8000, 137))
def test_an_interrupt_at_any_call_changes_nothing(after: int) -> None:
    model, optimizer, hidden = busiest()
    before = look(model, optimizer, hidden)
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            signal.raise_signal(signal.SIGINT)

    gc.disable()  # an interrupt inside a callback of the collector would never come out of it
    sys.setprofile(interrupt)
    try:
        snapshot = Snapshot(model, optimizer, CPU)
        with keep_random_state():
            train(model, optimizer, 1)
        snapshot.restore()
    except KeyboardInterrupt:
        sys.setprofile(None)
        with contextlib.suppress(UnboundLocalError):
            snapshot.restore()
    finally:
        sys.setprofile(None)
        gc.enable()
    assert differences(before, look(model, optimizer, hidden)) == {}


def test_a_second_interrupt_waits_until_everything_is_back() -> None:
    model, optimizer, hidden = busiest()
    before = look(model, optimizer, hidden)
    snapshot = Snapshot(model, optimizer, CPU)
    with keep_random_state():
        train(model, optimizer, 1)
    usual = signal.getsignal(signal.SIGINT)
    sys.setprofile(lambda *_: signal.raise_signal(signal.SIGINT) if signal.getsignal(signal.SIGINT) is not usual else None)
    try:
        with pytest.raises(KeyboardInterrupt):
            snapshot.restore()
    finally:
        sys.setprofile(None)
    assert signal.getsignal(signal.SIGINT) is usual
    assert differences(before, look(model, optimizer, hidden)) == {}


def test_what_a_step_has_closed_over_is_put_back() -> None:
    model, helper = nn.Linear(2, 2), Helper()
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loader = torch.utils.data.DataLoader(torch.arange(4), shuffle=True, generator=torch.Generator())

    def step(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        helper.count += 1
        helper.shadow[0].add_(1)
        list(loader)
        scaler.scale(model(batch).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        return model(batch).sum()

    held = (helper, scaler, scheduler, loader.generator)
    before = everything(model, optimizer, *held)
    snapshot = Snapshot(model, optimizer, CPU, also=(step,))
    step(model, torch.ones(1, 2))
    snapshot.restore()
    after = everything(model, optimizer, *held)
    assert {n for n in differences(before, after) if "random state" not in n} == set()


@pytest.mark.parametrize("kind", [list, lambda loader: next(iter(loader))])
def test_a_data_loaders_own_generator_is_put_back(kind: Callable[[Any], Any]) -> None:
    sampler = torch.utils.data.RandomSampler(range(8), generator=torch.Generator())
    loader = torch.utils.data.DataLoader(torch.arange(8), sampler=sampler, generator=torch.Generator())
    states = [generator.get_state() for generator in (sampler.generator, loader.generator)]
    with keep_random_state(loader):
        kind(loader)
    assert all(torch.equal(a, g.get_state()) for a, g in zip(states, (sampler.generator, loader.generator), strict=True))


def test_what_moves_on_by_itself_is_left_alone() -> None:
    model = nn.Linear(1, 1)
    model.rows, model.log = iter([1, 2, 3]), Helper()
    model.log.lock = threading.Lock()
    snapshot = Snapshot(model, None, CPU)
    next(model.rows)
    model.log.count += 1
    snapshot.restore()
    assert (next(model.rows), model.log.count) == (2, 1)
