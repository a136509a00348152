"""The noise scale of real models: what is measured, what is refused, and that nothing is changed by it."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch import InvalidRequest, NoiseMeter, WorkloadFailed
from tests.training import noise_rank


def mean(output: Tensor) -> Tensor:
    return output.mean()


def linear_batches(rows: int, scale: float, batch_size: int = 8, dimensions: int = 1000) -> list[Tensor]:
    """Return batches of rows that are the gradients of their own linear loss, with that noise scale."""
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(rows, dimensions, generator=draw) * (scale / dimensions) ** 0.5
    return list((noise + dimensions**-0.5).split(batch_size))


def classifier() -> tuple[nn.Sequential, DataLoader[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.LayerNorm(16), nn.Linear(16, 3))
    data = TensorDataset(torch.randn(400, 6), torch.randint(3, (400,)))
    return model, DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(7))


def by_cloning(model: nn.Module, windows: list[list[Tensor]]) -> tuple[float, float]:
    """Return |G|² and tr Σ the long way: every micro-gradient copied."""
    squared, variance = [], []
    for window in windows:
        gradients = []
        for batch in window:
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(mean(model(batch)), list(model.parameters()))]).double())
        stack = torch.stack(gradients)
        k, q, p = len(window), stack.square().sum(1).mean(), stack.mean(0).square().sum()
        squared.append((k * p - q) / (k - 1))
        variance.append(len(window[0]) * k * (q - p) / (k - 1))
    return float(torch.stack(squared).mean()), float(torch.stack(variance).mean())


def test_a_known_noise_scale_is_found() -> None:
    noise = autobatch.noise_scale(nn.Linear(1000, 1, bias=False), linear_batches(100 * 64, 500), mean, windows=100)
    assert noise.value is not None
    assert 470 <= noise.value <= 532
    assert noise.low is not None
    assert noise.low <= 500 <= noise.high  # type: ignore[operator]
    assert (noise.windows, noise.micro_batches, noise.rows) == (100, 8, 8)


def test_hooks_see_what_copies_would_show() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh())
    model.append(model[0])  # a layer used twice has one gradient
    batches = list(torch.randn(8 * 8 * 3, 5).split(3))
    noise = autobatch.noise_scale(model, batches, mean, windows=8)
    squared, variance = by_cloning(model, [batches[i : i + 8] for i in range(0, 64, 8)])
    assert noise.squared_gradient == pytest.approx(squared, rel=1e-4)
    assert noise.variance == pytest.approx(variance, rel=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(fails: bool) -> None:
    model, loader = classifier()
    F.cross_entropy(model(torch.randn(4, 6)), torch.tensor([0, 1, 2, 0])).backward()
    model.eval()
    calls: list[int] = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        if fails and len(calls) == 11:
            raise KeyError("theirs")
        return F.cross_entropy(output, target)

    def picture() -> list[Any]:
        tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters()), torch.get_rng_state(), loader.generator.get_state()]
        grads = [id(p.grad) for p in model.parameters()]
        hooks = [len(p._backward_hooks or ()) for p in model.parameters()]
        modes = [m.training for m in model.modules()]
        state = [t.clone().numpy().tobytes() for t in tensors if t is not None]
        return [state, grads, hooks, modes, random.getstate(), np.random.get_state()[1].tobytes(), torch.is_grad_enabled()]  # type: ignore[union-attr]

    with torch.no_grad():
        before = picture()
        if fails:
            with pytest.raises(KeyError, match="theirs"):
                autobatch.noise_scale(model, loader, loss_fn, windows=3)
        else:
            assert autobatch.noise_scale(model, loader, loss_fn, windows=3).windows == 3
        assert picture() == before


def test_a_loop_that_accumulates_measures_the_same_whatever_it_divides_by() -> None:
    batches = linear_batches(20 * 64, 50, dimensions=60)
    whole = autobatch.noise_scale(nn.Linear(60, 1, bias=False), batches, mean, windows=20)
    model = nn.Linear(60, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with NoiseMeter(model) as meter:
        for start in range(0, len(batches), 8):
            for batch in batches[start : start + 8]:
                (mean(model(batch)) / 8).backward()
                meter.micro_batch(len(batch))
            meter.window()
            optimizer.step()
            optimizer.zero_grad()
        noise = meter.noise_scale()
    assert noise.value == pytest.approx(whole.value, rel=1e-5)
    mean(model(batches[0])).backward()  # the hooks are off: nothing counts any more
    with pytest.raises(InvalidRequest, match="No gradient was computed since the last micro-batch"):
        meter.micro_batch(8)


def test_a_short_window_at_the_end_of_an_epoch_is_left_out() -> None:
    model = nn.Linear(60, 1, bias=False)
    batches = linear_batches(3 * 16, 5, dimensions=60)
    with NoiseMeter(model) as meter:
        for window in (batches[:2], batches[2:4], [batches[4]], [batches[4], batches[5][:3]]):
            for batch in window:
                mean(model(batch)).backward()
                meter.micro_batch(len(batch))
            meter.window()
            model.zero_grad()
        noise = meter.noise_scale()
    assert (noise.windows, noise.micro_batches, noise.rows) == (2, 2, 8)
    assert any(note.startswith("2 of the windows had other micro-batches") for note in noise.notes)


def test_two_ranks_measure_what_one_process_measures(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        started = []
        for rank in (0, 1):
            command = [sys.executable, noise_rank.__file__, str(rank), str(tmp_path / "store"), str(tmp_path / f"{rank}.json")]
            started.append(stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
            stack.callback(started[-1].kill)
        for process in started:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["same"]  # a pending gradient, which shares its memory with DDP's buckets
    alone = autobatch.noise_scale(noise_rank.model(), noise_rank.rows().split(8), noise_rank.mean, windows=8)
    for name in ("value", "low", "high", "squared_gradient", "variance"):
        assert first["noise"][name] == pytest.approx(getattr(alone, name), rel=1e-4)
    assert (first["noise"]["micro_batches"], first["noise"]["windows"]) == (8, 8)
    assert (first["loop"]["micro_batches"], first["loop"]["windows"]) == (4, 16)
    assert first["loop"]["value"] == pytest.approx(alone.value, rel=0.5)


def test_the_normalisation_layers_alone() -> None:
    model, loader = classifier()
    noise = autobatch.noise_scale(model, loader, F.cross_entropy, parameters="layernorm", windows=4)
    everything = autobatch.noise_scale(model, loader, F.cross_entropy, windows=4)
    assert noise.parameters == "layernorm"
    assert 0 < noise.variance < everything.variance
    assert any("Gray et al. 2024" in note for note in noise.notes)
    with pytest.raises(InvalidRequest, match=r"No parameter to measure \(parameters='layernorm'\)"):
        autobatch.noise_scale(nn.Linear(2, 2), [], mean, parameters="layernorm")


def test_sparse_gradients_and_low_precision_count() -> None:
    tokens = torch.randint(20, (8 * 4, 6), generator=torch.Generator().manual_seed(0)).split(1)
    torch.manual_seed(0)
    dense, sparse = nn.Embedding(20, 4), nn.Embedding(20, 4, sparse=True)
    sparse.load_state_dict(dense.state_dict())

    def loss_fn(output: Tensor) -> Tensor:
        return output.square().mean()

    measured = [autobatch.noise_scale(model, tokens, loss_fn, windows=4) for model in (dense, sparse, copy.deepcopy(dense).bfloat16())]
    assert measured[1].variance == pytest.approx(measured[0].variance, rel=1e-5)
    assert measured[2].variance == pytest.approx(measured[0].variance, rel=0.02)


def test_a_window_with_an_overflow_is_left_out() -> None:
    batches = linear_batches(5 * 64, 50, dimensions=60)
    batches[11] = batches[11] * torch.inf
    noise = autobatch.noise_scale(nn.Linear(60, 1, bias=False), batches, mean, windows=5)
    assert (noise.windows, noise.skipped) == (4, 1)


def test_data_that_is_repeated_is_refused() -> None:
    one = torch.randn(1, 5).repeat(400, 1)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 1))
    with pytest.raises(InvalidRequest, match="the same batch twice in a row"):
        autobatch.noise_scale(model, one.split(4), mean)
    labelled = [(one[:4], torch.full((4,), float(index))) for index in range(100)]
    with pytest.raises(InvalidRequest, match="micro-gradients of each of 4 windows are all alike"):
        autobatch.noise_scale(nn.Linear(5, 1), labelled, lambda output, target: output.mean() + 0 * target.mean(), windows=4)


def test_a_second_pass_over_the_same_batches_adds_nothing() -> None:
    batches = linear_batches(3 * 64 + 8, 5, dimensions=60)
    noise = autobatch.noise_scale(nn.Linear(60, 1), [*batches, batches[0][:3]], mean, windows=16)
    assert noise.windows == 3
    data = TensorDataset(torch.cat(batches))
    again = autobatch.noise_scale(nn.Linear(60, 1), DataLoader(data, batch_size=8, shuffle=True), step=lambda m, b: m(b[0]).mean())
    assert again.windows == 16


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        (12, {"micro_batches": 7}, "micro_batches is 7; 8 or more are needed"),
        (12, {"micro_batches": True}, "micro_batches is True"),
        (12, {"windows": 1}, "windows is 1; 2 or more"),
        (12, {"parameters": "bias"}, "parameters is 'bias'; known: all, layernorm"),
        (5, {}, "A pass over the loader gave 5 batches of 2 rows; a window needs 8 different ones"),
        (0, {}, "A pass over the loader gave 0 batches"),
    ],
)
def test_what_cannot_be_meant_is_named(batches: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        autobatch.noise_scale(nn.Linear(3, 1), list(torch.randn(batches * 2, 3).split(2)) if batches else [], mean, **options)


def test_a_loss_that_cannot_be_trained_on_is_named() -> None:
    batches = list(torch.randn(40, 3).split(2))
    with pytest.raises(InvalidRequest, match="There is no loss to take gradients of"):
        autobatch.noise_scale(nn.Linear(3, 1), batches)
    with pytest.raises(WorkloadFailed, match="a scalar is wanted"):
        autobatch.noise_scale(nn.Linear(3, 1), batches, lambda output: output)
    with pytest.raises(InvalidRequest, match="none of the model's requires a gradient"):
        autobatch.noise_scale(nn.Linear(3, 1).requires_grad_(False), batches, mean)
