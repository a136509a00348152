"""One trial on real CPU memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autobatch import Outcome, Probe, build_workload
from autobatch.core.units import MIB
from autobatch.devices.cpu import CpuDevice
from autobatch.probe.inline import InlineProber

ROW = 2 * MIB  # bytes of one row of the model below that live until the backward pass


class Wide(nn.Module):
    """One parameter, and an activation of ``ROW`` bytes a row that the backward pass needs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ROW // 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).square().mean()


def probers(model: nn.Module, budget: int, **arguments: Any) -> InlineProber:
    sample = arguments.pop("sample", torch.ones(1, 1))
    step = arguments.pop("step", lambda net, batch: net(batch))
    return InlineProber(build_workload(model, sample, step=step, **arguments), CpuDevice(), memory_budget=budget, margin=0.0)


@pytest.fixture
def wide() -> Iterator[InlineProber]:
    prober = probers(Wide(), 256 * MIB, optimizer=torch.optim.AdamW)
    yield prober
    prober.close()


def test_a_trial_that_fits_has_a_peak_for_each_phase(wide: InlineProber) -> None:
    probe = wide.probe(8, steps=3)
    assert (probe.batch_size, probe.outcome, probe.steps, probe.message) == (8, Outcome.FIT, 3, "")
    assert probe.forward_backward is not None
    assert probe.optimizer is not None
    # The product and its square for every row, beside weight and two moments; the optimizer has the gradient and no rows.
    assert probe.forward_backward.allocated > (2 * 8 + 3) * ROW
    assert 4 * ROW <= probe.optimizer.allocated < 8 * ROW
    assert probe.peak_allocated == probe.forward_backward.allocated
    assert probe.seconds_per_step is not None
    assert probe.samples_per_second is not None


def test_peaks_grow_by_the_same_bytes_a_row(wide: InlineProber) -> None:
    peaks = [wide.probe(size).forward_backward.allocated for size in (4, 8, 12, 16)]  # type: ignore[union-attr]
    steps = [after - before for before, after in itertools.pairwise(peaks)]
    assert max(steps) - min(steps) <= 0.01 * min(steps)


def test_a_trial_that_runs_out_says_so_and_leaves_nothing_behind(wide: InlineProber) -> None:
    before = wide.probe(8)
    failed = wide.probe(1000)
    assert failed.outcome is Outcome.OOM
    assert failed.steps == 0
    assert "can't allocate memory" in failed.message
    assert failed.notes == ()
    after = wide.probe(8)
    assert after.outcome is Outcome.FIT
    assert after.peak_allocated == pytest.approx(before.peak_allocated, rel=0.01)


def test_a_batch_too_large_to_be_made_is_memory_too(wide: InlineProber) -> None:
    assert wide.probe(2**60).outcome is Outcome.OOM


def test_the_users_error_comes_out_with_the_batch_size_noted() -> None:
    def step(net: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if len(batch) == 5:
            raise ZeroDivisionError("five is right out")
        return net(batch)

    prober = probers(Wide(), 256 * MIB, step=step)
    try:
        assert prober.probe(4).outcome is Outcome.FIT
        with pytest.raises(ZeroDivisionError, match="five is right out") as caught:
            prober.probe(5)
        assert "at batch size 5; it is not about memory" in caught.value.__notes__[0]
    finally:
        prober.close()


def test_optimizer_state_is_resident_before_a_size_is_judged() -> None:
    plain = probers(Wide(), 256 * MIB, optimizer=torch.optim.SGD)
    adam = probers(Wide(), 256 * MIB, optimizer=torch.optim.AdamW)
    try:
        difference = adam.probe(16).forward_backward.allocated - plain.probe(16).forward_backward.allocated  # type: ignore[union-attr]
    finally:
        adam.close()
        plain.close()
    assert difference == pytest.approx(2 * ROW, rel=0.25)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_precision_is_autocast_and_fp16_still_steps_the_optimizer(precision: str, dtype: torch.dtype) -> None:
    seen = []

    def step(net: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        out = net(batch)
        seen.append(out.dtype)
        return out.float().square().mean() * 1e30  # overflows fp16's first scale, so the scaler skips the step

    prober = probers(nn.Linear(64, 64), 256 * MIB, step=step, sample=torch.ones(1, 64), precision=precision, optimizer=torch.optim.AdamW)
    try:
        probe = prober.probe(2)
    finally:
        prober.close()
    assert set(seen) == {dtype}
    assert probe.outcome is Outcome.FIT
    assert probe.optimizer is not None


def notes_of(step: Any, *sizes: int) -> list[tuple[str, ...]]:
    prober = probers(nn.Linear(4, 4), 256 * MIB, step=step, sample=torch.ones(1, 4))
    try:
        return [prober.probe(size).notes for size in sizes]
    finally:
        prober.close()


def test_a_loss_that_is_not_finite_is_noted_once() -> None:
    first, second = notes_of(lambda net, batch: net(batch).sum() * float("nan"), 1, 2)
    assert "the loss was not finite in the first step" in first[0]
    assert second == ()


def test_a_missing_loss_is_noted() -> None:
    prober = InlineProber(build_workload(nn.Linear(4, 4), torch.ones(1, 4)), CpuDevice(), memory_budget=64 * MIB)
    try:
        assert "no loss_fn given" in prober.probe(1).notes[0]
    finally:
        prober.close()


def test_memory_that_a_step_keeps_is_reported_as_left_behind() -> None:
    kept = []

    def step(net: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        kept.append(torch.ones(16 * MIB))
        return net(batch).sum()

    (notes,) = notes_of(step, 1)
    assert len(notes) == 1
    assert notes[0].startswith("a trial left 19")
    assert notes[0].endswith("MiB behind that could not be freed")


def test_eval_mode_runs_forward_passes_alone() -> None:
    modes = []

    class Watch(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    prober = InlineProber(build_workload(Watch(4, 4), torch.ones(1, 4), mode="eval"), CpuDevice(), memory_budget=64 * MIB)
    try:
        probe: Probe = prober.probe(3)
    finally:
        prober.close()
    assert set(modes) == {(False, False)}
    assert (probe.optimizer, probe.notes) == (None, ())


def test_the_limit_on_address_space_is_put_back() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    prober = probers(Wide(), 64 * MIB)
    prober.probe(2)
    prober.probe(2000)
    prober.close()
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_losses_of_the_field_run() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    workload = build_workload(model, (torch.randn(4, 8), torch.randint(4, (4,))), loss_fn=F.cross_entropy, optimizer=torch.optim.RMSprop)
    prober = InlineProber(workload, CpuDevice(), memory_budget=64 * MIB)
    try:
        assert prober.probe(4).outcome is Outcome.FIT
        assert prober.setting.has_batch_norm
        assert prober.setting.optimizer_name == "RMSprop"
    finally:
        prober.close()
