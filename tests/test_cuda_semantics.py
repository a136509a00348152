"""A step as it runs on CUDA, without a card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autobatch.simulate.autocast_lists import FUSED_RMS_NORM
from autobatch.simulate.cuda_semantics import autocast, on_cuda, operator_temporaries, use_foreach
from autobatch.simulate.trace import Manner, Trace, trace_step
from autobatch.workload.workload import build_workload

AMPERE, TURING, KEPLER = (8, 0), (7, 5), (3, 5)


def traced(
    model: nn.Module, sample: Any, step: Any, *, precision: str | None = None, card: tuple[int, int] = AMPERE, optimizer: Any = None
) -> Trace:
    manner = Manner(around=lambda: autocast(precision), temporaries=operator_temporaries, prepare=use_foreach)
    with on_cuda(card):
        return trace_step(build_workload(model, sample, step=step, optimizer=optimizer), len(sample), manner)


class Attention(nn.Module):
    def __init__(self, head: int = 64, mask: bool = False) -> None:
        super().__init__()
        self.head, self.mask = head, mask
        self.qkv = nn.Linear(4 * head, 12 * head)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        query, key, value = self.qkv(x).view(rows, length, 3, 4, self.head).permute(2, 0, 3, 1, 4).unbind()
        mask = torch.ones(length, length, dtype=torch.bool) if self.mask else None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def attend(head: int = 64, mask: bool = False, **where: Any) -> Trace:
    return traced(Attention(head, mask), torch.randn(2, 100, 4 * head), lambda net, x: net(x).float().sum(), **where)


def operators(trace: Trace) -> set[str]:
    return {storage.operator for storage in trace.storages}


@pytest.mark.parametrize(
    ("where", "kernel"),
    [
        ({"precision": "bf16"}, "_scaled_dot_product_flash_attention"),
        ({"precision": "fp16"}, "_scaled_dot_product_flash_attention"),
        ({}, "_scaled_dot_product_efficient_attention"),
        ({"precision": "fp16", "card": TURING}, "_scaled_dot_product_efficient_attention"),
        ({"precision": "bf16", "mask": True}, "_scaled_dot_product_efficient_attention"),
        ({"precision": "bf16", "head": 264}, "_scaled_dot_product_efficient_attention"),
    ],
)
def test_attention_takes_the_kernel_of_dtype_mask_head_and_card(where: dict[str, Any], kernel: str) -> None:
    assert f"aten.{kernel}" in operators(attend(**where))


def test_attention_without_a_fused_kernel_stores_every_weight() -> None:
    sizes = {storage.size for storage in attend(card=KEPLER).storages if storage.phase == "forward"}
    assert 2 * 4 * 100 * 100 * 4 in sizes
    assert 2 * 4 * 100 * 100 * 4 not in {storage.size for storage in attend().storages}


def test_flash_attentions_backward_accumulates_in_fp32() -> None:
    trace = attend(head=40, precision="bf16")
    inside = [s for s in trace.storages if s.tag == "temporary" and s.operator == "aten._scaled_dot_product_flash_attention_backward"]
    assert max(storage.size for storage in inside) == 4 * 2 * 4 * 128 * (64 + 1)


def test_dropout_keeps_a_bool_mask() -> None:
    trace = traced(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)), torch.randn(8, 64), lambda net, x: net(x).square().mean())
    kept = [s.size for s in trace.storages if s.operator == "aten.native_dropout"]
    assert sorted(set(kept)) == [8 * 64, 8 * 64 * 4]


def test_autocast_keeps_norms_softmax_and_losses_in_fp32_and_casts_a_weight_once() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Softmax(-1))
    shared = model[0]
    seen: dict[str, torch.dtype] = {}

    def step(net: Any, x: Tensor) -> Tensor:
        hidden = net[0](x)
        seen["linear"] = hidden.dtype
        seen["again"] = net[0](x).dtype
        hidden = net[1](hidden)
        seen["norm"] = hidden.dtype
        seen["softmax"] = net[2](hidden.bfloat16()).dtype
        seen["cat"] = torch.cat([hidden, hidden.bfloat16()]).dtype
        loss = F.mse_loss(hidden.bfloat16(), torch.zeros_like(hidden))
        seen["loss"] = loss.dtype
        return loss

    trace = traced(model, torch.randn(8, 64), step, precision="bf16")
    full = torch.float32
    assert seen == {"linear": torch.bfloat16, "again": torch.bfloat16, "norm": full, "softmax": full, "cat": full, "loss": full}
    casts = [s for s in trace.storages if s.size == shared.weight.numel() * 2 and s.phase == "forward"]
    assert len(casts) == 2  # one in each iteration


def test_optimizers_step_over_all_parameters_at_once() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    together = traced(model, torch.randn(1, 256), lambda net, x: net(x).sum(), optimizer=torch.optim.AdamW)
    temporaries = sum(s.size for s in together.storages if s.phase == "optimizer" and s.operator.startswith("aten._foreach"))
    assert temporaries >= sum(p.numel() * 4 for p in model.parameters())


@pytest.mark.parametrize(
    ("precision", "kernel"),
    [("bf16", "_scaled_dot_product_flash_attention"), (None, "_scaled_dot_product_efficient_attention")],
)
def test_torchs_own_attention_module_is_caught_inside(precision: str | None, kernel: str) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, dim_feedforward=128, batch_first=True)
    trace = traced(layer, torch.randn(2, 10, 64), lambda net, x: net(x).float().sum(), precision=precision)
    assert f"aten.{kernel}" in operators(trace)
    assert F.linear.__name__ == "linear"


def test_checkpointed_blocks_keep_less_and_run_again_as_on_cuda() -> None:
    from autobatch.simulate.step import checkpoint_blocks, repeated_blocks

    blocks = nn.Sequential(*(nn.TransformerEncoderLayer(64, 4, dim_feedforward=256, batch_first=True) for _ in range(6)))
    work = build_workload(blocks, torch.randn(8, 32, 64), step=lambda net, x: net(x).float().sum(), precision="bf16")
    peaks = []
    for change in (lambda _: None, checkpoint_blocks):
        manner = Manner(around=lambda: autocast("bf16"), change=change)
        with on_cuda(AMPERE):
            peaks.append(trace_step(work, 64, manner).peak())
    assert len(repeated_blocks(blocks)) == 6
    assert peaks[1] < 0.5 * peaks[0]


def test_norms_of_the_root_mean_square_keep_input_and_one_number_a_row() -> None:
    trace = traced(nn.RMSNorm(512), torch.randn(64, 512), lambda net, x: net(x.requires_grad_()).sum())
    kept = [s.size for s in trace.storages if s.phase == "forward" and s.tag == "activation"]
    assert kept.count(64 * 4) == 2  # one in each iteration
    assert kept.count(64 * 512 * 4) == (0 if FUSED_RMS_NORM else 2)


def test_batch_norm_keeps_half_precision_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SyncBatchNorm(8))
    for precision in ("bf16", "fp16"):
        trace = traced(model, torch.randn(16, 4, 32, 32), lambda net, x: net(x).float().sum(), precision=precision)
        half = 16 * 8 * 32 * 32 * 2
        made = [s.size for s in trace.storages if s.phase == "forward" and s.operator == "aten.native_batch_norm"]
        assert sorted(made)[-4:] == [half] * 4  # two layers in each of two iterations
        assert not [s for s in trace.storages if s.phase == "forward" and s.size == 2 * half and s.tag == "activation"]
