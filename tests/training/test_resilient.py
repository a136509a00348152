"""Training under a real limit on the CPU's memory: what runs out is run again, and nothing else changes."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autobatch
from autobatch import InvalidRequest, NoBatchSizeFits
from autobatch.core.units import MIB
from autobatch.devices.cpu import CpuDevice
from autobatch.training.accumulation import Reduction, windows

WIDTH = 2**15  # float64 numbers of one row that live until the backward pass: 256 KiB for each of two operators
LIMIT = 24 * MIB


class Wide(nn.Module):
    """Few parameters, and 512 KiB of activations a row."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4, dtype=torch.float64)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(x).tanh().sum(1, keepdim=True)
        return (hidden.expand(-1, WIDTH).mul(self.scale).sin()).mean(1)


@contextlib.contextmanager
def limited(limit: int = LIMIT) -> Iterator[None]:
    device = CpuDevice()
    gc.collect()
    with device.session(), device.cap(limit, 0):
        device.reset_peaks()
        device.reset_peaks()
        yield


def data(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 3, dtype=torch.float64, generator=generator)
    return x, x.sum(1).tanh()


def mean_loss(model: nn.Module) -> Callable[[Any], torch.Tensor]:
    return lambda batch: F.mse_loss(model(batch[0]), batch[1])


def weights(model: nn.Module) -> list[list[float]]:
    return [parameter.detach().flatten().tolist() for parameter in model.parameters()]


def close(one: list[list[float]], other: list[list[float]]) -> bool:
    return all(a == pytest.approx(b, rel=1e-6, abs=1e-9) for a, b in zip(one, other, strict=True))


def train(model: nn.Module, run: Callable[[Any], torch.Tensor], batch_size: int, rows: int = 200) -> list[float]:
    """Train for an epoch and return the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for batch in zip(*(part.split(batch_size) for part in data(rows)), strict=True):
        losses.append(float(run(batch)))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def plainly(model: nn.Module) -> Callable[[Any], torch.Tensor]:
    def run(batch: Any) -> torch.Tensor:
        loss = mean_loss(model)(batch)
        loss.backward()
        return loss.detach()

    return run


def test_an_epoch_under_a_limit_ends_with_the_weights_of_one_without() -> None:
    model = Wide()
    free, plain = copy.deepcopy(model), copy.deepcopy(model)
    wanted = train(free, plainly(free), 80)
    with limited(), pytest.raises(RuntimeError, match="can't allocate memory"):
        train(plain, plainly(plain), 80)
    run = autobatch.resilient(mean_loss(model), model=model, loss="mean")
    with limited(), pytest.warns(RuntimeWarning, match=r"rows ran out of memory \(.*can't allocate memory"):
        losses = train(model, run, 80)
    assert close(weights(model), weights(free))
    assert losses == pytest.approx(wanted, rel=1e-9)
    assert "; they run again as micro-batches of at most 40 rows with the same gradient" in run.notes[0]
    assert run.batch_size is not None
    assert 5 <= run.batch_size < 80


class Seen(nn.Module):
    """Its gradient counts how often each row was in it."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.times = nn.Parameter(torch.zeros(rows))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        own = self.times[ids]
        return (own[:, None].expand(-1, WIDTH).exp().exp() * 0).sum() + own.sum()


@pytest.mark.parametrize("batch_size", [100, 37])
def test_no_row_is_left_out_and_none_counts_twice(batch_size: int) -> None:
    model = Seen(150)
    notes: list[str] = []
    run = autobatch.resilient(model, model=model, loss="sum", on_split=notes.append)
    with limited(16 * MIB):
        for ids in torch.randperm(150).split(batch_size):
            run(ids)
    assert notes == run.notes != []
    assert model.times.grad is not None
    assert model.times.grad.tolist() == [1.0] * 150


def test_a_window_keeps_what_was_accumulated_before_the_micro_batch_that_failed() -> None:
    x, y = data(60)
    batches = [(x[start:stop], y[start:stop]) for start, stop in ((0, 4), (4, 9), (9, 57), (57, 60))]
    model = Wide()
    free = copy.deepcopy(model)
    wanted = float(plainly(free)((x, y)))
    run = autobatch.resilient(mean_loss(model), model=model, loss="mean", on_split=lambda _: None)
    before = []
    with limited():
        (window,) = windows(batches, 4, Reduction("mean"))
        total = 0.0
        for micro in window:
            before.append(run.batch_size)
            total += float(run(micro))
    assert before[:3] == [None] * 3
    assert run.batch_size is not None
    assert total == pytest.approx(wanted)
    grads = [[p.grad.flatten().tolist() for p in one.parameters() if p.grad is not None] for one in (model, free)]
    assert close(*grads)


def test_the_smaller_size_is_remembered_and_nothing_fails_twice() -> None:
    model = Wide()
    tried: list[int] = []

    def step(batch: Any) -> torch.Tensor:
        tried.append(len(batch[0]))
        return mean_loss(model)(batch)

    run = autobatch.resilient(step, model=model, loss="mean", on_split=lambda _: None)
    with limited():
        train(model, run, 80, rows=160)
        after, told = len(tried), list(run.notes)
        train(model, run, 80, rows=160)
    assert tried[0] == 80
    assert tried[1] == 40
    assert tried[after:] == [run.batch_size] * (160 // (run.batch_size or 1))
    assert run.notes == told != []


def test_a_loop_of_its_own_runs_what_failed_again() -> None:
    model = Wide()
    free = copy.deepcopy(model)
    train(free, plainly(free), 80)
    guard = autobatch.resilient(model=model, loss="mean", on_split=lambda _: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    rows = 0
    with limited():
        for batch in zip(*(part.split(80) for part in data(200)), strict=True):
            for micro in guard.micro_batches(batch):
                with micro:
                    micro.weighted(mean_loss(model)(micro.batch)).backward()
                    rows += micro.rows
            optimizer.step()
            optimizer.zero_grad()
    assert rows == 200
    assert guard.notes
    assert close(weights(model), weights(free))


def test_variables_of_the_block_that_hold_a_failed_attempt_are_told() -> None:
    model = Wide()
    guard = autobatch.resilient(model=model, loss="mean", on_split=lambda _: None)
    with limited():
        for micro in guard.micro_batches(data(40)):
            with micro:
                loss = mean_loss(model)(micro.batch)
                if micro.rows > 20:
                    micro.weighted(loss)
                    torch.empty(LIMIT)  # runs out while the loss is held
                micro.weighted(loss).backward()
    assert guard.notes[0].endswith("still holds the failed attempt's memory: call a function in the block instead")


class Noisy(nn.Module):
    """Changes its buffers and draws from every generator before it runs out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)
        self.own = torch.Generator().manual_seed(5)
        self.drawn: list[list[float]] = []
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        out = self.norm(x)
        self.drawn.append([random.random(), float(np.random.rand()), float(torch.rand(())), float(torch.rand((), generator=self.own))])
        if len(x) > 10:
            torch.empty(2**60)
        return out.square().mean()


def test_random_states_and_buffers_are_as_if_the_failed_attempt_had_not_been() -> None:
    x = data(16)[0]
    model = Noisy()
    twin = copy.deepcopy(model)
    twin.own = torch.Generator().manual_seed(5)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    run = autobatch.resilient(model, model=model, loss="mean", on_split=lambda _: None)
    run(x)
    after = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    for part in x.split(8):
        (twin(part) / 2).backward()
    assert model.drawn[1:] == twin.drawn
    assert model.drawn[0] == twin.drawn[0]
    assert after == [random.random(), float(np.random.rand()), float(torch.rand(()))]
    assert model.calls.tolist() == [2.0]
    assert {name: one.tolist() for name, one in model.named_buffers()} == {name: one.tolist() for name, one in twin.named_buffers()}
    assert close([p.grad.tolist() for p in model.parameters()], [p.grad.tolist() for p in twin.parameters()])  # type: ignore[union-attr]


def test_gradients_that_a_broken_backward_pass_half_changed_are_put_back() -> None:
    class RunsOut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            if len(gradient) > 4:
                torch.empty(2**60)
            return gradient

    first, last = nn.Linear(2, 2, dtype=torch.float64), nn.Linear(2, 1, dtype=torch.float64)
    x = torch.randn(8, 2, dtype=torch.float64)
    for parameter in (*first.parameters(), last.weight):
        parameter.grad = torch.full_like(parameter, 3.0)
    held = [last.weight.grad, last.bias.grad]
    run = autobatch.resilient(
        lambda rows: last(RunsOut.apply(first(rows))).mean(), model=[first, last], loss="mean", on_split=lambda _: None
    )
    run(x)
    assert last.weight.grad is held[0]
    assert held[1] is None
    assert torch.allclose(last.weight.grad, 3 + first(x).mean(0))
    assert last.bias.grad is not None
    assert last.bias.grad.tolist() == pytest.approx([1.0])
    assert not last.weight._backward_hooks


def test_a_single_row_that_does_not_fit_ends_in_one_error_with_figures() -> None:
    model = nn.Linear(3, 1, dtype=torch.float64)

    def step(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1 or x[0, 0] == 9:
            torch.empty(2**60)
        return model(x).mean()

    x = torch.ones(4, 3, dtype=torch.float64)
    x[2, 0] = 9
    run = autobatch.resilient(step, model=model, loss="mean", on_split=lambda _: None)
    with pytest.raises(NoBatchSizeFits, match="A single row ran out of memory: .* 2 of the batch's 4 rows are in the gradients") as caught:
        run(x)
    assert caught.value.batch_size == 1
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert len(run.notes) == 2
    assert model.bias.grad is not None
    assert model.bias.grad.tolist() == pytest.approx([0.5])


@pytest.mark.parametrize("error", [ValueError("labels"), RuntimeError("CUDA error: device-side assert triggered"), KeyboardInterrupt()])
def test_errors_that_are_not_about_memory_come_out_as_they_are(error: BaseException) -> None:
    model = Noisy()

    def step(x: torch.Tensor) -> torch.Tensor:
        model(x)
        raise error

    run = autobatch.resilient(step, model=model, loss="mean")
    with pytest.raises(type(error)) as caught:
        run(data(4)[0])
    assert caught.value is error
    assert model.calls.tolist() == [1.0]  # as the step left it
    assert (run.batch_size, run.notes) == (None, [])


def test_what_a_failed_attempt_held_is_free_before_the_next() -> None:
    model = nn.Linear(3, 1, dtype=torch.float64)
    held: list[Any] = []

    def step(x: torch.Tensor) -> torch.Tensor:
        alive = [reference for reference in held if reference() is not None]
        assert alive == []
        activations = x.repeat(1, 100)
        held.append(weakref.ref(activations))
        if len(x) > 2:
            torch.empty(2**60)
        return model(activations[:, :3]).mean()

    run = autobatch.resilient(step, model=model, loss="mean", on_split=lambda _: None)
    run(data(8)[0])
    assert run.batch_size == 2
    assert len(held) == 2 + 4


def test_token_losses_keep_the_gradient_of_the_whole_batch() -> None:
    model = nn.Embedding(7, 7, dtype=torch.float64)
    batch = {"input_ids": torch.randint(0, 7, (6, 5)), "labels": torch.randint(0, 7, (6, 5))}
    for row, length in enumerate((5, 1, 0, 0, 3, 2)):  # two rows have nothing but padding
        batch["labels"][row, length:] = -100

    def step(part: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(part["labels"]) > 2:
            torch.empty(2**60)
        return F.cross_entropy(model(part["input_ids"]).flatten(0, 1), part["labels"].flatten())

    loss = F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    assert model.weight.grad is not None
    wanted = model.weight.grad.clone()
    model.zero_grad()
    run = autobatch.resilient(step, model=model, loss="tokens", count="labels", on_split=lambda _: None)
    assert run(batch).item() == pytest.approx(loss.item())  # the mean of two rows of padding alone would be 0/0
    assert run.batch_size == 2
    assert torch.allclose(model.weight.grad, wanted, atol=1e-12)


def test_lbfgs_calls_the_step_as_its_closure() -> None:
    model = nn.Linear(3, 1, dtype=torch.float64)
    free = copy.deepcopy(model)
    x, y = data(16)

    def fit(net: nn.Module, run: Callable[[Any], torch.Tensor]) -> None:
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=10, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            return run((x, y))

        optimizer.step(closure)  # type: ignore[arg-type]

    def step(batch: Any) -> torch.Tensor:
        if len(batch[0]) > 5:
            torch.empty(2**60)
        return F.mse_loss(model(batch[0]).squeeze(1), batch[1])

    def plain(batch: Any) -> torch.Tensor:
        loss = F.mse_loss(free(batch[0]).squeeze(1), batch[1])
        loss.backward()
        return loss

    fit(free, plain)
    fit(model, autobatch.resilient(step, model=model, loss="mean", on_split=lambda _: None))
    assert close(weights(model), weights(free))


def test_sparse_gradients_are_put_back() -> None:
    model = nn.Embedding(5, 2, sparse=True)
    run = autobatch.resilient(
        lambda ids: model(ids).sum() + (torch.empty(2**60) if len(ids) > 2 else 0), model=model, loss="sum", on_split=lambda _: None
    )
    run(torch.tensor([0, 1]))
    run(torch.tensor([1, 2, 3]))
    assert model.weight.grad is not None
    assert model.weight.grad.to_dense()[:, 0].tolist() == [1.0, 2.0, 1.0, 1.0, 0.0]


def test_a_gradient_scaler_is_the_backward_pass() -> None:
    model = nn.Linear(3, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run = autobatch.resilient(
        lambda x: model(x).mean(),
        model=model,
        loss="mean",
        batch_size=3,
        backward=lambda loss: scaler.scale(loss).backward(),  # type: ignore[no-untyped-call]
    )
    bias = model.bias.item()
    run(torch.ones(8, 3))
    scaler.step(optimizer)
    scaler.update()
    assert model.bias.item() == pytest.approx(bias - 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": []}, "model= got nothing"),
        ({"model": [nn.Linear(1, 1), "head"]}, "model= got Linear, str"),
        ({"batch_size": 0}, "batch_size is 0; a whole number of 1 or more"),
        ({"loss": "average"}, "loss is 'average'; known: 'mean'"),
        ({"loss": "tokens"}, "loss='tokens' needs count="),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        autobatch.resilient(lambda batch: batch, **{"model": nn.Linear(1, 1), "loss": "mean", **arguments})


def test_a_step_that_cannot_be_guarded_is_refused() -> None:
    model, head = nn.Linear(2, 2), nn.Linear(2, 1)
    with pytest.raises(InvalidRequest, match=r"depends on 2 parameters that belong to none of the modules given \(the first has shape"):
        autobatch.resilient(lambda x: head(model(x)).mean(), model=model, loss="mean")(torch.ones(2, 2))
    with pytest.raises(InvalidRequest, match=r"batch\[1\] has 3 rows but batch\[0\] has 2"):
        autobatch.resilient(lambda batch: model(batch[0]).mean(), model=model, loss="mean")((torch.ones(2, 2), torch.ones(3)))
    with pytest.raises(InvalidRequest, match="No step was given"):
        autobatch.resilient(model=model, loss="mean")(torch.ones(2, 2))
    with pytest.raises(InvalidRequest, match="run without its context"):
        list(autobatch.resilient(model=model, loss="mean").micro_batches(torch.ones(2, 2)))
    with pytest.raises(autobatch.WorkloadFailed, match="step returned a float; a scalar tensor is wanted"):
        autobatch.resilient(lambda x: model(x).mean().item(), model=model, loss="mean")(torch.ones(2, 2))  # type: ignore[arg-type, return-value]
