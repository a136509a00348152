"""Recurrent layers as cuDNN runs them, and what operators take inside themselves, without a card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from autobatch.simulate.cuda_semantics import autocast, on_cuda, operator_temporaries
from autobatch.simulate.trace import Manner, Trace, trace_step
from autobatch.workload.workload import build_workload

ROWS, TIME, SIZE, HIDDEN = 4, 10, 32, 64


def traced(model: nn.Module, sample: Any, step: Any, *, precision: str | None = None, **how: Any) -> Trace:
    manner = Manner(around=lambda: autocast(precision), temporaries=operator_temporaries)
    with on_cuda((8, 0)):
        return trace_step(build_workload(model, sample, step=step), len(sample), manner, **how)


def recurrent(model: nn.Module, **how: Any) -> Trace:
    sample = torch.randn(ROWS, TIME, SIZE)
    order = (lambda x: x) if model.batch_first else (lambda x: x.transpose(0, 1))
    return traced(model, sample, lambda net, x: net(order(x))[0].float().sum(), **how)


def sizes(trace: Trace, tag: str = "activation") -> list[int]:
    return [s.size for s in trace.storages if s.phase == "forward" and s.tag == tag]


@pytest.mark.parametrize(
    ("kind", "options", "reserve"),
    [
        (nn.LSTM, {}, 5 * HIDDEN),
        (nn.GRU, {}, 4 * HIDDEN),
        (nn.RNN, {}, HIDDEN),
        (nn.RNN, {"nonlinearity": "relu", "batch_first": True}, HIDDEN),
        (nn.LSTM, {"batch_first": True}, 5 * HIDDEN),
        (nn.LSTM, {"bidirectional": True}, 10 * HIDDEN),
        (nn.LSTM, {"num_layers": 3}, 15 * HIDDEN + 2 * HIDDEN),
        (nn.LSTM, {"num_layers": 3, "dropout": 0.5, "bidirectional": True}, 30 * HIDDEN + 8 * HIDDEN),
        (nn.LSTM, {"proj_size": 16, "num_layers": 2}, 10 * HIDDEN + 16),
        (nn.GRU, {"bias": False}, 4 * HIDDEN),
    ],
)
def test_recurrent_layers_keep_output_and_reserve(kind: Any, options: dict[str, Any], reserve: int) -> None:
    model = kind(SIZE, HIDDEN, **options)
    trace = recurrent(model)
    output = (2 if model.bidirectional else 1) * (model.proj_size or HIDDEN)
    kept = sizes(trace)
    assert kept.count(ROWS * TIME * reserve * 4) in (2, 4)  # one in each iteration, and the output where it is of that size
    assert ROWS * TIME * output * 4 in kept
    state = 2 * model.num_layers * (2 if model.bidirectional else 1) * ROWS * HIDDEN * 4
    assert sum(kept) <= 2 * (ROWS * TIME * (reserve + output) * 4 + 3 * state)


def test_weights_gradients_lie_in_one_buffer() -> None:
    model = nn.LSTM(SIZE, HIDDEN, num_layers=2)
    gradients = [s.size for s in recurrent(model).storages if s.tag == "gradient"]
    assert gradients == [4 * sum(p.numel() for p in model.parameters())] * 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_casts_the_weights_of_recurrent_layers_to_fp16_at_every_call(precision: str) -> None:
    model = nn.LSTM(SIZE, HIDDEN)
    found: list[torch.dtype] = []

    def step(net: Any, x: Tensor) -> Tensor:
        output, (hidden, cell) = net(net(x)[0][..., :SIZE])
        found.extend([output.dtype, hidden.dtype, cell.dtype])
        return output.float().sum()  # type: ignore[no-any-return]

    kept = sizes(traced(model, torch.randn(ROWS, TIME, SIZE), step, precision=precision))
    assert set(found) == {torch.float16}
    assert kept.count(2 * sum(p.numel() for p in model.parameters())) == 4
    assert kept.count(ROWS * TIME * 5 * HIDDEN * 2) == 4


def test_inference_keeps_no_reserve() -> None:
    with on_cuda((8, 0)):
        work = build_workload(nn.LSTM(SIZE, HIDDEN), torch.randn(ROWS, TIME, SIZE), mode="eval")
        trace = trace_step(work, ROWS)
    assert max(s.size for s in trace.storages if s.tag != "parameter") == ROWS * TIME * 5 * HIDDEN * 4
    assert ROWS * TIME * 5 * HIDDEN * 4 not in sizes(trace)


def test_packed_sequences_keep_their_own_time_steps_only() -> None:
    def step(net: Any, x: Tensor) -> Tensor:
        data = x.reshape(-1, SIZE)[:25]
        return net(PackedSequence(data, torch.tensor([4, 4, 4, 4, 4, 2, 1, 1, 1])))[0].data.sum()  # type: ignore[no-any-return]

    # Their lengths are values, so such a step is traced on real tensors.
    trace = traced(nn.GRU(SIZE, HIDDEN), torch.randn(ROWS, TIME, SIZE), step, real=True)
    assert 25 * 4 * HIDDEN * 4 in sizes(trace)


def inside(trace: Trace, operator: str) -> list[int]:
    """Return what one iteration's operators take inside themselves, which nothing else is marked with at birth."""
    found = []
    for index, storage in enumerate(trace.storages):
        if storage.operator == operator and storage.tag == "temporary":
            birth, death = trace.events.index(index), trace.events.index(~index)
            born = [e for e in trace.events[birth + 1 : death] if e >= 0]
            if all(trace.storages[e].operator == operator for e in born) and born:
                found.append(storage.size)
    return found


def test_an_embeddings_backward_sorts_its_indices() -> None:
    def step(net: Any, x: Tensor) -> Tensor:
        return net(x).sum()  # type: ignore[no-any-return]

    trace = traced(nn.Embedding(100, 64), torch.zeros(8, 1000, dtype=torch.long), step)
    count, segments, parts = 8000, 100, 900
    assert inside(trace, "aten.embedding_dense_backward") == [5 * 8 * count + 8 * (3 * segments + parts) + 4 * parts * 64] * 2


def test_indexing_s_backward_sorts_its_indices() -> None:
    def step(net: Any, x: Tensor) -> Tensor:
        return net.weight[x].sum()  # type: ignore[no-any-return]

    trace = traced(nn.Embedding(100, 64), torch.zeros(8, 1000, dtype=torch.long), step)
    assert inside(trace, "aten.index_put") == [5 * 8 * 8000] * 2


@pytest.mark.parametrize(("precision", "last", "transposed"), [("bf16", False, True), ("bf16", True, False), (None, False, False)])
def test_convolutions_transpose_half_precision_that_is_not_channels_last(precision: str | None, last: bool, transposed: bool) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.ConvTranspose2d(16, 8, 2, stride=2, bias=False))
    order = torch.channels_last if last else torch.contiguous_format
    model.to(memory_format=order)  # type: ignore[call-overload]

    def step(net: Any, x: Tensor) -> Tensor:
        return net(x.contiguous(memory_format=order)).float().sum()  # type: ignore[no-any-return]

    trace = traced(model, torch.randn(2, 8, 32, 32), step, precision=precision)
    small, large = 2 * 16 * 16 * 16, 2 * 8 * 32 * 32
    wanted = [2 * (large + 16 * 8 * 9 + small), 2 * (small + 16 * 8 * 4 + large)]
    assert inside(trace, "aten.convolution") == (wanted * 2 if transposed else [])
    backward = [size for size in inside(trace, "aten.convolution_backward") if size in wanted]
    assert sorted(backward) == (sorted(wanted * 2) if transposed else [])


@pytest.mark.parametrize(("precision", "size"), [("fp16", 2 * 4 * (128 * 64 + 100) * 4), (None, 2 * 4 * 100 * 41 * 4)])
def test_memory_efficient_attentions_backward_accumulates_in_fp32(precision: str | None, size: int) -> None:
    def step(net: Any, x: Tensor) -> Tensor:
        query, key, value = net(x).view(2, 100, 3, 4, 40).permute(2, 0, 3, 1, 4).unbind()
        mask = torch.ones(100, 100, dtype=torch.bool)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).float().sum()

    trace = traced(nn.Linear(160, 480), torch.randn(2, 100, 160), step, precision=precision)
    assert inside(trace, "aten._scaled_dot_product_efficient_attention_backward") == [size] * 2


def test_a_sort_carries_places_beside_its_numbers() -> None:
    def step(net: Any, x: Tensor) -> Tensor:
        return torch.sort(net(x), dim=1).values.sum()

    numbers = 8 * 500
    assert inside(traced(nn.Linear(10, 500), torch.zeros(8, 10), step), "aten.sort") == [numbers * (4 + 3 * 8)] * 2
