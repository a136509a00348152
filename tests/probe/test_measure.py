"""One trial on real CPU memory."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from played_card import Card, Driver
from torch import nn
from torch.nn import functional as F

from autobatch import Outcome, Probe, WorkloadFailed, build_workload, find
from autobatch.core.units import GIB, MIB
from autobatch.devices.cpu import CpuDevice
from autobatch.devices.cuda import CudaDevice
from autobatch.devices.nvml import Nvml
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
    assert "MiB behind that could not be freed, on top of" in notes[0]
    assert notes[0].endswith("keep loss.item() or tensor.detach().cpu() instead")


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


# Before torch 2.8 the same errors were plain RuntimeErrors.
ACCELERATOR_ERROR: type[RuntimeError] = getattr(torch, "AcceleratorError", RuntimeError)
ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"


def breaking_above(limit: int, message: str = ILLEGAL) -> Any:
    """Return a step that fails above ``limit`` rows as a kernel does whose indices overflow."""

    def step(net: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > limit:
            raise getattr(torch, "AcceleratorError", RuntimeError)(message)
        return net(batch).sum()

    return step


@pytest.mark.parametrize("message", [ILLEGAL, "CUDA error: device-side assert triggered", "CUDA error: unspecified launch failure"])
def test_an_error_that_breaks_the_device_stops_probing_in_this_process(message: str) -> None:
    model = nn.Linear(4, 4)
    weights = model.weight.detach().clone()
    prober = probers(model, 256 * MIB, step=breaking_above(6, message), sample=torch.ones(1, 4), optimizer=torch.optim.AdamW)
    try:
        assert [prober.probe(size).outcome for size in (2, 6, 4)] == [Outcome.FIT] * 3
        with pytest.raises(WorkloadFailed) as caught:
            prober.probe(7)
        text = str(caught.value)
        assert f"batch size 7 left this process unable to use cpu: {message.splitlines()[0]}." in text
        assert "Batch size 6 was the largest that fitted before it." in text
        assert "find(…, isolate=True), which survives this" in text
        assert (caught.value.batch_size, type(caught.value.__cause__)) == (7, ACCELERATOR_ERROR)
        with pytest.raises(WorkloadFailed, match="Batch size 2 was not tried: an earlier trial has left this process unable to use cpu"):
            prober.probe(2)
        assert prober.worn
    finally:
        prober.close()
    assert torch.equal(model.weight, weights)


@pytest.mark.parametrize(("broken", "message"), [(True, ILLEGAL), (True, "the disk is full"), (False, ILLEGAL)])
def test_what_lies_on_a_lost_device_is_given_up_and_nothing_else(broken: bool, message: str) -> None:
    class Log(list[int]):
        """What the restore of a tensor is that lies on a card: it fails with the card's error."""

        def clear(self) -> None:
            raise ACCELERATOR_ERROR(message)

    model = nn.Linear(4, 4)
    model.log = Log()
    prober = probers(model, 256 * MIB, step=breaking_above(6 if broken else 99), sample=torch.ones(1, 4))
    model.log.append(1)
    with pytest.raises(WorkloadFailed) if broken else contextlib.nullcontext():
        prober.probe(7)
    with contextlib.nullcontext() if broken and message == ILLEGAL else pytest.raises(RuntimeError, match=message.splitlines()[0]):
        prober.close()


def test_a_device_that_breaks_at_the_first_size_says_that_none_had_fitted() -> None:
    prober = probers(nn.Linear(4, 4), 256 * MIB, step=breaking_above(0), sample=torch.ones(1, 4))
    try:
        with pytest.raises(WorkloadFailed, match="No batch size had fitted before it"):
            prober.probe(1)
    finally:
        prober.close()


def test_find_in_this_process_ends_with_what_was_known() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(WorkloadFailed, match=r"left this process unable to use cpu.*Batch size \d+ was the largest that fitted"):
        find(model, torch.ones(1, 4), step=breaking_above(6), device="cpu", isolate=False, memory_budget=64 * MIB, max_batch_size=64)


def test_in_a_worker_the_size_is_a_wall_of_its_own_kind_and_the_search_goes_on() -> None:
    model = nn.Linear(4, 4)
    plan = find(model, torch.ones(1, 4), step=breaking_above(6), device="cpu", isolate=True, memory_budget=64 * MIB, max_batch_size=64)
    assert plan.batch_size == 6
    crashed = [probe for probe in plan.probes if probe.outcome is Outcome.CRASHED]
    assert min(probe.batch_size for probe in crashed) == 7
    assert {probe.outcome for probe in plan.probes} == {Outcome.FIT, Outcome.CRASHED}
    assert crashed[0].message.startswith("CUDA error: an illegal memory access was encountered (the worker could not use cpu any more")


def test_one_row_that_breaks_the_device_in_a_worker_is_the_users_error() -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"):
        find(nn.Linear(4, 4), torch.ones(1, 4), step=breaking_above(0), device="cpu", isolate=True, memory_budget=64 * MIB)


def test_nothing_of_a_failed_trial_stays_alive() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def inner(batch: torch.Tensor) -> None:
        activations = torch.ones(len(batch), 4)
        held.append(weakref.ref(activations))
        raise RuntimeError("CUDA error: out of memory")

    def step(net: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        output = net(batch)
        held.append(weakref.ref(output))
        try:
            inner(batch)
        except RuntimeError as error:
            kept = error  # a cycle: the frame holds the error, the error holds the frame
            raise ValueError("the layer failed") from kept
        return output

    prober = probers(nn.Linear(4, 4), 64 * MIB, step=step, sample=torch.ones(1, 4))
    gc.collect()
    gc.disable()
    try:
        assert prober.probe(3).outcome is Outcome.OOM
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()
        prober.close()


class OnCard:
    """A prober on the card played in Python; tensors are on the CPU, the step says what they would take of the card."""

    def __init__(self, step: Any) -> None:
        self.card = Card()
        device = CudaDevice(0, cuda=self.card, nvml=Nvml(Driver([])))
        device.name = "cpu"
        self.calls = 0

        def counted(net: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            step(self, len(batch))
            return net(batch).sum()

        self.prober: InlineProber = InlineProber(
            build_workload(nn.Linear(4, 4), torch.ones(1, 4), step=counted), device, memory_budget=8 * GIB, margin=0.0
        )


def a_gib_a_row(on: OnCard, rows: int) -> None:
    on.card.allocate(rows * GIB)
    on.card.free(rows * GIB)


def test_memory_that_comes_back_late_is_waited_for_once() -> None:
    def step(on: OnCard, rows: int) -> None:
        if on.calls == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        a_gib_a_row(on, rows)

    on = OnCard(step)
    probe = on.prober.probe(4)
    on.prober.close()
    assert (probe.outcome, probe.steps, on.calls) == (Outcome.FIT, 3, 4)
    assert "ran out of memory at its first try and not at its second" in probe.notes[0]
    assert probe.peak_allocated == 4 * GIB


def test_a_size_that_fails_twice_does_not_fit() -> None:
    on = OnCard(a_gib_a_row)
    probe = on.prober.probe(9)
    on.prober.close()
    assert (probe.outcome, probe.steps, on.calls, probe.notes) == (Outcome.OOM, 0, 2, ())
    assert "CUDA out of memory" in probe.message
    assert on.card.fraction == 1.0


def test_an_answer_must_run_at_the_first_try() -> None:
    on = OnCard(a_gib_a_row)
    probe = on.prober.probe(9, confirm=True)
    on.prober.close()
    assert (probe.outcome, on.calls) == (Outcome.OOM, 1)


@pytest.mark.parametrize(("retries", "times"), [(1, "once"), (3, "3 times")])
def test_a_step_that_only_ran_after_the_cache_was_given_back_is_tight(retries: int, times: str) -> None:
    def step(on: OnCard, rows: int) -> None:
        on.card.retries += retries if on.calls == 2 else 0

    on = OnCard(step)
    probe = on.prober.probe(4)
    assert (probe.outcome, probe.steps, probe.allocation_retries) == (Outcome.TIGHT, 3, retries)
    assert probe.message == f"the allocator ran out and gave its cache back {times}"
    assert on.prober.probe(4).outcome is Outcome.FIT  # what an earlier trial needed does not count
    on.prober.close()


def test_a_limit_of_a_kernel_is_not_tried_twice() -> None:
    def step(on: OnCard, rows: int) -> None:
        raise RuntimeError("input tensor must fit into 32-bit index math")

    on = OnCard(step)
    assert on.prober.probe(4).outcome is Outcome.KERNEL_LIMIT
    on.prober.close()
    assert on.calls == 1


@pytest.mark.parametrize("kept", [15, 17])
def test_a_leak_is_told_by_its_bytes_also_where_the_trial_failed(kept: int) -> None:
    def step(on: OnCard, rows: int) -> None:
        on.card.allocate(kept * MIB // 2)  # each try leaves half of it
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    on = OnCard(step)
    probe = on.prober.probe(4)
    on.prober.close()
    assert on.prober.worn is (kept > 16)
    assert (
        probe.notes == () if kept < 16 else probe.notes[0].startswith("a trial left 17.0 MiB behind that could not be freed, on top of 0")
    )
