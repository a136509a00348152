"""Accumulated gradients are those of the whole batch, whatever the loss, the dtype and the cut."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections import UserDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from autobatch import InvalidRequest, resilient
from autobatch.core.plan import BatchPlan
from autobatch.training.accumulation import MicroStep

Pair = namedtuple("Pair", "x y")
LossOf = Callable[[nn.Module, Any], torch.Tensor]


def plan(batch_size: int = 8, accumulation_steps: int = 1) -> BatchPlan:
    return BatchPlan(
        batch_size=batch_size, accumulation_steps=accumulation_steps, global_batch_size=batch_size * accumulation_steps,
        limited_by="memory", best=batch_size, exact=True, budget=1, cap=1, margin=0.0, device="cpu",
    )  # fmt: skip


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8, dtype=dtype)
        self.body = nn.Sequential(nn.Linear(8, 16, dtype=dtype), nn.Tanh(), nn.LayerNorm(16, dtype=dtype), nn.Linear(16, 11, dtype=dtype))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.body(self.embed(ids))


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]).double()


def whole(model: nn.Module, loss_of: LossOf, batch: Any) -> torch.Tensor:
    model.zero_grad()
    loss_of(model, batch).backward()
    return gradients(model)


def accumulated(model: nn.Module, loss_of: LossOf, steps: list[MicroStep]) -> torch.Tensor:
    model.zero_grad()
    for micro in steps:
        micro.weighted(loss_of(model, micro.batch)).backward()
    return gradients(model)


def text(rows: int, length: int = 6, seed: int = 0, least: int = 0) -> dict[str, torch.Tensor]:
    """Return ragged rows of tokens, padded; labels of the padding are -100."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(0, 11, (rows, length), generator=generator) for _ in range(2))
    lengths = torch.randint(least, length + 1, (rows,), generator=generator)
    lengths[-1] = length
    return {"ids": ids, "labels": labels.masked_fill(torch.arange(length) >= lengths[:, None], -100)}


def cross_entropy(**options: Any) -> LossOf:
    return lambda model, batch: F.cross_entropy(model(batch["ids"]).flatten(0, 1).float(), batch["labels"].flatten(), **options)


def row_mean(model: nn.Module, batch: Any) -> torch.Tensor:
    """A mean over rows of the mean over each row's tokens."""
    losses = F.cross_entropy(model(batch["ids"]).transpose(1, 2), batch["labels"], reduction="none")
    return (losses.sum(1) / (batch["labels"] != -100).sum(1).clamp(min=1)).mean()


def shifted(model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss of a language model that shifts the labels itself."""
    return F.cross_entropy(model(batch["ids"])[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def mse(model: nn.Module, batch: Any) -> torch.Tensor:
    out = model(batch["ids"]).mean((1, 2))
    return F.mse_loss(out, batch["labels"].double().mean(1).to(out.dtype))


LOSSES: dict[str, tuple[LossOf, dict[str, Any]]] = {
    "cross entropy, mean over rows": (row_mean, {"loss": "mean"}),
    "cross entropy, sum": (cross_entropy(reduction="sum"), {"loss": "sum"}),
    "cross entropy, padding ignored": (cross_entropy(), {"loss": "tokens", "count": "labels"}),
    "language model that shifts": (shifted, {"loss": "tokens", "count": lambda batch: (batch["labels"][:, 1:] != -100).sum()}),
    "mean squared error": (mse, {"loss": "mean"}),
}


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 45), st.integers(0, 10**6))
def test_the_gradient_is_that_of_the_whole_batch(name: str, rows: int, size: int, seed: int) -> None:
    loss_of, options = LOSSES[name]
    model, batch = Net(), text(rows, seed=seed)
    steps = plan(size).micro_batches(batch, **options)
    assert max(len(micro.batch["ids"]) for micro in steps) <= size
    wanted = whole(model, loss_of, batch)
    assert torch.allclose(accumulated(model, loss_of, steps), wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


# float32 sums in another order. bfloat16 keeps 8 bits of every product and sum, so the gradient of a whole batch is itself off by percents.
@pytest.mark.parametrize(("dtype", "autocast", "bound"), [("float64", False, 1e-12), ("float32", False, 1e-6), ("float32", True, 2**-4)])
@pytest.mark.parametrize("name", LOSSES)
def test_dtypes_keep_to_their_bounds(name: str, dtype: str, autocast: bool, bound: float) -> None:
    loss_of, options = LOSSES[name]
    model, batch = Net(getattr(torch, dtype)), text(32)

    def loss(net: nn.Module, part: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return loss_of(net, part)

    wanted = whole(model, loss, batch)
    difference = (accumulated(model, loss, plan(5).micro_batches(batch, **options)) - wanted).abs().max()
    assert float(difference / wanted.abs().max()) <= bound


def test_ten_tokens_at_two_and_a_half_and_ninety_at_a_half_make_seven_tenths() -> None:
    labels = torch.full((2, 90), -100)
    labels[0, :10], labels[1] = 1, 1
    first, second = plan(1).micro_batches((torch.zeros(2, 1), labels), loss="tokens", count=1)
    total = first.weighted(torch.tensor(2.5)) + second.weighted(torch.tensor(0.5))
    assert float(total) == pytest.approx(0.70)
    assert (first.weight, second.weight) == (pytest.approx(0.1), pytest.approx(0.9))


@pytest.mark.parametrize(
    ("rows", "size", "sizes"), [(128, 65, [64, 64]), (128, 64, [64, 64]), (65, 64, [33, 32]), (10, 4, [4, 3, 3]), (3, 8, [3]), (1, 1, [1])]
)
def test_parts_are_the_fewest_and_as_equal_as_can_be(rows: int, size: int, sizes: list[int]) -> None:
    steps = plan(size).micro_batches(torch.arange(rows), loss="mean")
    assert [len(micro.batch) for micro in steps] == sizes
    assert torch.cat([micro.batch for micro in steps]).tolist() == list(range(rows))
    assert [micro.index for micro in steps] == list(range(len(sizes)))
    assert [micro.is_last for micro in steps] == [False] * (len(sizes) - 1) + [True]
    assert sum(micro.weight for micro in steps) == pytest.approx(1.0)


@dataclasses.dataclass
class Graph:
    nodes: torch.Tensor
    names: list[str]
    kind: str = "graph"


class Encoding(UserDict[str, Any]):
    """Stands for the mapping types of tokenizers."""


@pytest.mark.parametrize(
    ("batch", "first"),
    [
        (torch.arange(4), torch.tensor([0, 1])),
        (Pair(torch.arange(4), {"y": torch.arange(4)}), Pair(torch.tensor([0, 1]), {"y": torch.tensor([0, 1])})),
        (Graph(torch.arange(4), ["a", "b", "c", "d"]), Graph(torch.tensor([0, 1]), ["a", "b"])),
        (Encoding(x=torch.arange(4), a=("a", "b", "c", "d"), b=[1, 2, 3]), Encoding(x=torch.tensor([0, 1]), a=("a", "b"), b=[1, 2, 3])),
        ([torch.arange(4), np.arange(4), None, 7], [torch.tensor([0, 1]), np.arange(2), None, 7]),
    ],
    ids=["tensor", "namedtuple", "dataclass", "mapping", "list"],
)  # fmt: skip
def test_nests_are_cut_row_by_row(batch: Any, first: Any) -> None:
    cut = plan(2).micro_batches(batch, loss="mean")[0].batch
    assert type(cut) is type(batch)
    assert str(cut) == str(first)


def test_parts_are_views_of_the_batch() -> None:
    batch = torch.zeros(4)
    plan(2).micro_batches(batch, loss="mean")[1].batch.fill_(1)
    assert batch.tolist() == [0.0, 0.0, 1.0, 1.0]


def test_windows_gather_what_the_loader_yields_and_the_last_has_its_own_count() -> None:
    model = nn.Linear(3, 1, dtype=torch.float64)
    x = torch.randn(23, 3, dtype=torch.float64)
    loader = DataLoader(TensorDataset(x), batch_size=4)
    found = []
    for window in plan(4, accumulation_steps=4).windows(loader, loss="mean"):
        found.append(accumulated(model, lambda net, batch: net(batch[0]).square().mean(), window))
        assert [micro.is_last for micro in window] == [False] * (len(window) - 1) + [True]
    wanted = [whole(model, lambda net, part: net(part).square().mean(), part) for part in (x[:16], x[16:])]
    assert len(found) == 2
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(found, wanted, strict=True))


def test_windows_weigh_tokens_over_the_whole_window() -> None:
    model, batch = Net(), text(12)
    parts = [{key: value[start : start + 3] for key, value in batch.items()} for start in range(0, 12, 3)]
    (window,) = plan(3, accumulation_steps=4).windows(parts, loss="tokens", count="labels")
    assert torch.allclose(accumulated(model, cross_entropy(), window), whole(model, cross_entropy(), batch), rtol=1e-6, atol=1e-7)


def test_windows_take_batches_whose_rows_cannot_be_counted() -> None:
    batches = [([torch.zeros(3, 5, 5), torch.zeros(3, 7, 4)], [1, 2]), ([torch.zeros(3, 6, 6)], [3])]
    (window,) = plan(2, accumulation_steps=2).windows(batches, loss="tokens", count=lambda batch: len(batch[0]))
    assert [micro.weight for micro in window] == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    (window,) = plan(2, accumulation_steps=2).windows(batches, loss="sum")
    assert [(micro.weight, micro.terms) for micro in window] == [(1.0, None)] * 2


def test_a_micro_batch_of_padding_alone_is_left_out() -> None:
    batch = text(6, least=1)
    batch["labels"][2:4] = -100
    steps = plan(2).micro_batches(batch, loss="tokens", count="labels")
    assert [(micro.index, micro.steps) for micro in steps] == [(0, 2), (1, 2)]
    model = Net()
    found = accumulated(model, cross_entropy(), steps)
    assert torch.allclose(found, whole(model, cross_entropy(), batch), rtol=1e-6, atol=1e-7)
    batch["labels"][:] = -100
    with pytest.raises(InvalidRequest, match="No token of the 3 micro-batches counts, so the mean loss would be 0/0"):
        plan(2).micro_batches(batch, loss="tokens", count="labels")


def train(windows: Any, model: nn.Module, scale: float) -> tuple[list[float], list[float], int]:
    """Train as the loop in the manual does: once per update clip, step, schedule and update the scale."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    rates, norms = [], []
    for window in windows:
        for micro in window:
            loss = cross_entropy()(model, micro.batch)
            scaler.scale(micro.weighted(loss)).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        scaler.step(optimizer)
        scaler.update()
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
        optimizer.zero_grad()
    return rates, norms, int(scaler.get_scale())


def test_clip_scheduler_and_scaler_once_an_update_end_where_whole_batches_do() -> None:
    batch = text(40)
    parts = [{key: value[start : start + 4] for key, value in batch.items()} for start in range(0, 40, 4)]
    large = [{key: value[start : start + 16] for key, value in batch.items()} for start in range(0, 40, 16)]
    options: dict[str, Any] = {"loss": "tokens", "count": "labels"}
    one, other = Net(torch.float32), Net(torch.float32)
    accumulation = train(plan(4, 4).windows(parts, **options), one, 2.0**10)
    plain = train(plan(16).windows(large, **options), other, 2.0**10)
    assert accumulation[0] == plain[0] == [0.1, 0.05, 0.025]
    assert accumulation[1] == pytest.approx(plain[1], rel=1e-5)
    assert accumulation[2] == plain[2] == 2**11  # grew once, after two updates
    for mine, wanted in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, wanted, atol=1e-6)


@pytest.mark.parametrize("divide", [lambda loss: loss / 4, lambda loss: loss * 0.25, lambda loss: loss.div_(4)])
def test_a_loss_that_was_divided_already_is_told(divide: Callable[[torch.Tensor], torch.Tensor]) -> None:
    micro = plan(2).micro_batches(torch.ones(8, 3), loss="mean")[0]
    loss = nn.Linear(3, 1)(micro.batch).mean() * 1
    with pytest.warns(UserWarning, match="divided by 4, the number of micro-batches .* the gradient is 4 times too small"):
        micro.weighted(divide(loss))


def test_a_loss_divided_by_anything_else_is_not() -> None:
    micro = plan(2).micro_batches(torch.ones(8, 3), loss="mean")[0]
    out = nn.Linear(3, 1)(micro.batch)
    for loss in (out.sum() / 2, out.mean() * 4, out.mean() / torch.tensor(3.0), out.mean() / 0, out.mean()):
        micro.weighted(loss)
    square = plan(4).micro_batches(torch.ones(16, 3), loss="mean")[0]
    square.weighted(nn.Linear(3, 1)(square.batch).sum() / 4)  # by its own rows, which happen to be as many


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ((torch.zeros(3), {"y": torch.zeros(4)}), {"loss": "mean"}, r"batch\[1\]\['y'\] has 4 rows but batch\[0\] has 3"),
        (
            {"x": torch.tensor(1.0)},
            {"loss": "mean"},
            r"batch\['x'\] is a scalar tensor and has no rows. Give micro-batches",
        ),
        ("text", {"loss": "mean"}, r"The batch \(str\) holds no tensor"),
        (torch.zeros(0, 2), {"loss": "mean"}, "The batch is empty: its tensors have 0 rows"),
        (torch.zeros(3), {"loss": "average"}, "loss is 'average'; known: 'mean'"),
        (torch.zeros(3), {"loss": "tokens"}, "loss='tokens' needs count="),
        (torch.zeros(3), {"loss": "mean", "count": "labels"}, "count= belongs to loss='tokens'; with loss='mean'"),
        (
            {"x": torch.zeros(3)},
            {"loss": "tokens", "count": "labels"},
            r"count='labels' leads to no tensor of labels in the batch",
        ),
        (torch.zeros(3), {"loss": "tokens", "count": lambda _: -1}, "count= gave -1 for a micro-batch"),
        (torch.zeros(3), {"loss": "tokens", "count": lambda _: float("nan")}, "count= gave nan for a micro-batch"),
    ],
)
def test_what_cannot_be_weighed_is_refused(batch: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        plan(2).micro_batches(batch, **options)


def on_rank(rank: int, store: str) -> None:
    """Hold the gradient of two ranks with unequal shares against that of the whole batch."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        batch = text(14, seed=3, least=1)
        share = {key: value[:9] if rank == 0 else value[9:] for key, value in batch.items()}
        for loss_of, options in LOSSES.values():
            wanted, model = whole(Net(), loss_of, batch), Net()
            parallel = nn.parallel.DistributedDataParallel(model)
            for micro in plan(2).micro_batches(share, across_ranks=True, **options):
                with micro.sync(parallel):
                    micro.weighted(loss_of(parallel, micro.batch)).backward()
            assert torch.allclose(gradients(model), wanted, rtol=1e-6, atol=1e-7)
        with pytest.raises(InvalidRequest, match="2 ranks train together with loss='sum'"):
            plan(2).micro_batches(share, loss="sum")
        alone = plan(2).micro_batches(share, loss="tokens", count="labels", across_ranks=False)
        assert sum(micro.weight for micro in alone) == pytest.approx(1.0)
        with pytest.raises(InvalidRequest, match="The model is a DistributedDataParallel over 2 ranks. A rank that runs out"):
            resilient(model=parallel, loss="mean")
    finally:
        distributed.destroy_process_group()


def test_ranks_with_unequal_shares_average_to_the_gradient_of_the_whole(tmp_path: Path) -> None:
    script = "import sys; from test_accumulation import on_rank; on_rank(int(sys.argv[1]), sys.argv[2])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    ranks = [
        subprocess.Popen([sys.executable, "-c", script, str(rank), str(tmp_path / "store")], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
