"""Autocast, checkpointing and gradient scaling as they work on CUDA, without a card."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autobatch.simulate.cuda_semantics import autocast, on_cuda, operator_temporaries, use_foreach
from autobatch.simulate.trace import Manner, Trace, trace_step
from autobatch.workload.workload import build_workload

FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


def traced(model: nn.Module, sample: Any, step: Any, *, precision: str | None = None, optimizer: Any = None) -> Trace:
    manner = Manner(around=lambda: autocast(precision), temporaries=operator_temporaries, prepare=use_foreach)
    with on_cuda((8, 0)):
        return trace_step(build_workload(model, sample, step=step, optimizer=optimizer), len(sample), manner)


def seen(function: Callable[[Tensor], Any], *, precision: str | None = None, dtype: torch.dtype = FULL) -> Any:
    """Return what ``function`` returns for a 4 by 4 tensor inside a traced step."""
    results = []

    def step(net: Any, x: Tensor) -> Tensor:
        results.append(function(x.to(dtype)))
        return net.weight.sum()

    traced(nn.Linear(4, 4), torch.randn(4, 4), step, precision=precision)
    return results[0]


@pytest.mark.parametrize(
    ("region", "dtype"),
    [
        (lambda: torch.autocast("cuda", dtype=BRAIN), BRAIN),
        (lambda: torch.autocast(device_type="cuda"), HALF),
        (lambda: torch.amp.autocast("cuda", dtype=BRAIN), BRAIN),
        (lambda: torch.autocast("cpu"), HALF),  # a script that trains where the tensors are
        (lambda: torch.autocast("cuda", enabled=False), FULL),
        (contextlib.nullcontext, FULL),
    ],
)
def test_the_steps_own_autocast_is_cudas(region: Any, dtype: torch.dtype) -> None:
    def function(x: Tensor) -> Any:
        with region():
            return (x @ x).dtype, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result, enabled, low = seen(function)
    assert (result, enabled) == (dtype, dtype != FULL)
    assert low == dtype or not enabled


def test_the_older_autocast_works_too() -> None:
    def function(x: Tensor) -> torch.dtype:
        with torch.cuda.amp.autocast():
            return (x @ x).dtype

    with pytest.warns(FutureWarning, match="autocast"):
        assert seen(function) == HALF


def test_autocast_regions_nest_and_decorate() -> None:
    def function(x: Tensor) -> list[torch.dtype]:
        with torch.autocast("cuda", dtype=BRAIN):
            found = [(x @ x).dtype]
            with torch.autocast("cuda", enabled=False):
                found.append((x @ x).dtype)
            with torch.autocast("cuda", dtype=HALF):
                found.append((x @ x).dtype)
            found.append((x @ x).dtype)
        return [*found, (x @ x).dtype, torch.autocast("cuda", dtype=HALF)(torch.matmul)(x, x).dtype]

    assert seen(function) == [BRAIN, FULL, HALF, BRAIN, FULL, HALF]
    assert seen(function, precision="fp16")[4] == HALF


@pytest.mark.parametrize("regions", [1, 2])
def test_a_weight_is_cast_once_in_the_outermost_region(regions: int) -> None:
    def step(net: Any, x: Tensor) -> Tensor:
        for _ in range(regions):
            with torch.autocast("cuda", dtype=BRAIN):
                for enabled in (True, False):
                    with torch.autocast("cuda", dtype=BRAIN, enabled=enabled):
                        x = net(x.float()).float()
                x = net(x).float()
        return x.sum()

    trace = traced(nn.Linear(64, 64, bias=False), torch.randn(8, 64), step)
    casts = [s for s in trace.storages if s.operator == "aten._to_copy" and s.size == 64 * 64 * 2 and s.phase == "forward"]
    assert len(casts) == 2 * regions  # in each of two iterations


class Blocks(nn.Module):
    """Layers that may be checkpointed, as models do it themselves."""

    def __init__(self, kind: str, tell: Callable[[torch.dtype], None]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(64, 4, dim_feedforward=256, batch_first=True) for _ in range(6))
        self.kind, self.tell = kind, tell

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        self.tell(layer.linear1(x).dtype)  # type: ignore[operator]
        return layer(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for layer in self.layers:
            x = self.run(layer, x) if self.kind == "plain" else checkpoint(self.run, layer, x, use_reentrant=self.kind == "reentrant")
        return x


def test_checkpointed_parts_run_again_in_the_same_precision_with_the_same_kernels() -> None:
    traces = {}
    for kind in ("plain", "reentrant", "other"):
        dtypes: list[torch.dtype] = []
        # The backward pass begins outside of autocast, which PyTorch brings back where it computes again.
        traces[kind] = traced(Blocks(kind, dtypes.append), torch.randn(64, 32, 64), lambda net, x: net(x).float().sum(), precision="bf16")
        assert set(dtypes) == {BRAIN}
        assert len(dtypes) == (12 if kind == "plain" else 24)
    peaks = {kind: trace.peak() for kind, trace in traces.items()}
    assert peaks["reentrant"] < 0.5 * peaks["plain"]
    assert abs(peaks["reentrant"] - peaks["other"]) < 0.1 * peaks["other"]
    again = {s.operator for s in traces["other"].storages if s.phase == "backward"}
    assert {"aten._scaled_dot_product_flash_attention", "aten.native_dropout"} <= again


def test_casts_of_weights_are_made_anew_where_a_part_runs_again() -> None:
    def step(net: Any, x: Tensor) -> Tensor:
        return checkpoint(lambda x: net(torch.relu(net(x))), x, use_reentrant=False).float().sum()  # type: ignore[no-any-return]

    trace = traced(nn.Linear(64, 64, bias=False), torch.randn(8, 64), step, precision="bf16")
    casts = [s for s in trace.storages if s.operator == "aten._to_copy" and s.size == 64 * 64 * 2]
    assert sorted(s.phase for s in casts) == ["backward", "backward", "forward", "forward"]


def test_a_backward_pass_inside_the_step_keeps_the_semantics() -> None:
    dtypes: list[torch.dtype] = []

    def step(net: Any, x: Tensor) -> Tensor:
        net(x).float().sum().backward()
        return next(net.parameters()).sum()

    traced(Blocks("other", dtypes.append), torch.randn(2, 8, 64), step, precision="bf16")
    assert set(dtypes) == {BRAIN}
    assert len(dtypes) == 24


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, lambda p: torch.optim.AdamW(p, fused=True)])
def test_gradients_are_scaled_without_values(optimizer: Any) -> None:
    model = nn.Linear(64, 64)
    scaler: list[torch.amp.GradScaler] = []
    updated: list[float] = []

    def step(net: Any, x: Tensor) -> Tensor:
        if not scaler:
            scaler.append(torch.amp.GradScaler("cuda"))
        own = optimizer(net.parameters())
        scaler[0].scale(net(x).float().sum()).backward()
        scaler[0].unscale_(own)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler[0].step(own)
        scaler[0].update()
        updated.append(scaler[0].get_scale())
        return scaler[0].scale(net(x).float().sum())

    for _ in range(2):  # a second trace meets the same scaler
        trace = traced(model, torch.randn(8, 64), step, precision="fp16")
    assert updated == [2.0**16] * 4
    plain = traced(model, torch.randn(8, 64), lambda net, x: net(x).float().sum(), precision="fp16")
    assert trace.peak() > plain.peak()


def test_a_scaled_loss_costs_scalars() -> None:
    def step(net: Any, x: Tensor) -> Tensor:
        return torch.amp.GradScaler("cuda").scale(net(x).float().sum())

    scaled, plain = (
        traced(nn.Linear(64, 64), torch.randn(8, 64), function, precision="fp16") for function in (step, lambda n, x: n(x).float().sum())
    )
    assert 0 < scaled.peak() - plain.peak() <= 64


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (lambda x: x.softmax(-1), FULL),
        (lambda x: F.log_softmax(x, -1), FULL),
        (lambda x: F.softmax(x, -1, dtype=BRAIN), BRAIN),
        (lambda x: x.sum(), FULL),
        (lambda x: torch.sum(x, 0), FULL),
        (lambda x: x.cumsum(0), FULL),
        (lambda x: x.prod(), FULL),
        (lambda x: x.norm(), FULL),
        (lambda x: torch.norm(x, dim=1), FULL),
        (lambda x: torch.linalg.vector_norm(x), FULL),
        (lambda x: F.normalize(x), FULL),
        (lambda x: torch.cdist(x, x), FULL),
        (lambda x: x**2, FULL),
        (lambda x: 2**x, FULL),
        (lambda x: 1 / x, FULL),
        (lambda x: x.exp(), FULL),
        (lambda x: F.interpolate(x[None, None], scale_factor=2), FULL),
        (lambda x: F.layer_norm(x, (4,)), FULL),
        (lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.long)), FULL),
        (lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.long), label_smoothing=0.1), FULL),
        (lambda x: F.cross_entropy(x, x), FULL),
        (lambda x: F.binary_cross_entropy_with_logits(x, x), FULL),
        (lambda x: F.gumbel_softmax(x), FULL),
        (lambda x: torch.cat([x, x.float()]), FULL),
        (lambda x: torch.dot(x[0], x[0].float()), FULL),
        (lambda x: x.float() @ x.float(), BRAIN),
        (lambda x: torch.einsum("ij,jk", x.float(), x.float()), BRAIN),
        (lambda x: x.float().addmm(x, x), BRAIN),
        (lambda x: nn.functional.conv1d(x.float()[None], x.float()[None].transpose(1, 2)), BRAIN),
        (lambda x: nn.LSTMCell(4, 4)(x.float())[0], BRAIN),
        (lambda x: x.mean(), BRAIN),
        (lambda x: F.gelu(x), BRAIN),
        (lambda x: F.max_pool2d(x[None], 2), BRAIN),
        (lambda x: F.adaptive_max_pool2d(x[None], 2), BRAIN),
        (lambda x: x.double() @ x.double(), torch.float64),
    ],
)
def test_autocast_follows_cudas_lists(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    assert seen(lambda x: function(x).dtype, precision="bf16", dtype=BRAIN) == dtype


@pytest.mark.parametrize(("precision", "copies"), [("bf16", 1), ("fp16", 0)])
def test_softmax_copies_its_input_to_fp32_from_bf16_only(precision: str, copies: int) -> None:
    trace = traced(nn.Linear(16, 64, bias=False), torch.randn(32, 16), lambda net, x: net(x).softmax(-1).sum(), precision=precision)
    made = [s for s in trace.storages if s.operator == "aten._to_copy" and s.size == 32 * 64 * 4 and s.phase == "forward"]
    assert len(made) == 2 * copies


def test_cross_entropy_keeps_its_logarithms_in_half_precision_and_once_more_in_fp32() -> None:
    def step(net: Any, x: Tensor) -> Tensor:
        return F.cross_entropy(net(x), torch.zeros(32, dtype=torch.long))

    trace = traced(nn.Linear(64, 1000, bias=False), torch.randn(32, 64), step, precision="bf16")
    kept = [(s.operator, s.size) for s in trace.storages if s.phase == "forward" and s.tag == "activation" and s.size >= 32 * 1000]
    assert sorted(set(kept)) == [("aten._log_softmax", 32 * 1000 * 2), ("aten._to_copy", 32 * 1000 * 4)]
