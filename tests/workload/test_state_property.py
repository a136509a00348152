"""Random models, faults at random operators of real trials: afterwards not one byte differs."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from grammar import LAYERS, OPTIMIZERS, WIDTH, Built, Fault, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from picture import differences, everything
from torch import Tensor, nn

from autobatch import build_workload
from autobatch.core.units import GIB
from autobatch.devices.cpu import CpuDevice
from autobatch.probe.inline import InlineProber
from autobatch.probe.measure import measure
from autobatch.workload.state import Snapshot, keep_random_state

FAULTS = {
    "none": lambda: None,
    "memory": lambda: MemoryError("injected"),
    "torch": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: injected"),
    "interrupt": lambda: KeyboardInterrupt("injected"),
    "value": lambda: ValueError("injected"),
}
SWITCHES = st.fixed_dictionaries({name: st.booleans() for name in ("resumed", "groups", "scheduled", "tied", "gradients")})


@pytest.fixture(scope="module")
def device() -> Iterator[CpuDevice]:
    device, threads = CpuDevice(), torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny
    with keep_random_state(), device.session():
        yield device
    torch.set_num_threads(threads)


def turn_switches(built: Built) -> None:
    """What a careless step may do to the process and to what is around the model."""
    random.random(), np.random.rand(), torch.rand(())
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("high")
    torch.set_anomaly_enabled(False, False)
    if built.optimizer is not None:
        built.optimizer.param_groups[0]["lr"] = built.optimizer.param_groups[0]["lr"] * 0.5
        built.optimizer.register_step_post_hook(lambda *_: None)


def trial(built: Built, device: CpuDevice, snapshot: Snapshot, fault: Fault | None, careless: bool) -> None:
    def step(model: nn.Module, batch: Tensor) -> Tensor:
        if careless:
            turn_switches(built)
        loss = model(batch).square().mean()
        if built.scheduler is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a scheduler complains of being called before the optimizer
                built.scheduler.step()
        return loss

    work = build_workload(built.model, torch.ones(2, WIDTH), optimizer=built.optimizer, step=step)
    with contextlib.ExitStack() as stack:
        if fault is not None:
            stack.enter_context(fault)
        for size in (2, 3):
            measure(work, device, size, steps=2, cap=4 * GIB, drop=snapshot.drop_created)


@settings(max_examples=500, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    layers=st.lists(st.sampled_from(sorted(LAYERS)), max_size=4),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    switches=SWITCHES,
    fault=st.sampled_from(sorted(FAULTS)),
    after=st.integers(1, 400),
    careless=st.booleans(),
)
def test_not_one_byte_differs_after_a_fault_at_any_operator(
    device: CpuDevice, layers: list[str], optimizer: str, switches: dict[str, bool], fault: str, after: int, careless: bool
) -> None:
    torch.manual_seed(after), random.seed(after), np.random.seed(after)
    built = build(layers, optimizer, **switches)
    error = FAULTS[fault]()
    before = everything(built.model, built.optimizer, built.scheduler)
    with keep_random_state():
        snapshot = Snapshot(built.model, built.optimizer, torch.device("cpu"), also=(built.scheduler,))
        try:
            trial(built, device, snapshot, Fault(after, error) if error is not None else None, careless)
        except BaseException as raised:
            if raised is not error:
                raise
        finally:
            snapshot.restore()
    assert differences(before, everything(built.model, built.optimizer, built.scheduler)) == {}


@pytest.mark.parametrize("seed", range(12))
def test_the_real_prober_leaves_nothing_behind(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    layers = draw.sample(sorted(LAYERS), 3)
    switches = {name: draw.random() < 0.5 for name in ("resumed", "groups", "tied", "gradients")}
    built = build(layers, draw.choice(sorted(OPTIMIZERS)), scheduled=False, **switches)
    error = FAULTS[draw.choice(sorted(FAULTS))]()
    fault = Fault(draw.randrange(1, 200), error) if error is not None else contextlib.nullcontext()
    work = build_workload(built.model, torch.ones(2, WIDTH), optimizer=built.optimizer)
    before = everything(built.model, built.optimizer)
    with contextlib.suppress(type(error) if error is not None else ()), keep_random_state():
        prober = InlineProber(work, CpuDevice(), memory_budget=4 * GIB)
        with contextlib.closing(prober), fault:
            prober.probe(2)
            prober.probe(3, confirm=True)
    assert differences(before, everything(built.model, built.optimizer)) == {}
