"""Every entry of the zoo builds, trains and traces, so that a recording of it on a card can be held against its trace."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from autobatch.simulate.apart import run_apart
from autobatch.simulate.step import trace_for
from autobatch.workload.workload import Workload, build_workload
from benchmarks.zoo import CARD_SCALE, ZOO


@pytest.fixture(scope="module", autouse=True)
def _quick_forks() -> Iterator[None]:
    """Keep what is here already out of the garbage collections of every traced step."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def trained(work: Workload) -> bool:
    """Return whether a step on two rows changes a parameter; fp16 runs as bf16, which the CPU has kernels for."""
    before = [parameter.detach().clone() for parameter in work.model.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=work.precision != "fp32"):
        loss, _ = work.loss(work.model, work.make_batch(2))
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]
    assert work.optimizer is not None
    work.optimizer.step()
    return bool(loss.isfinite()) and any(not torch.equal(old, new) for old, new in zip(before, work.model.parameters(), strict=True))


def test_the_zoo_is_wide() -> None:
    assert len(ZOO) >= 40
    parts = {part for name in ZOO for part in name.split("-")}
    assert {"fp32", "bf16", "fp16", "sgd", "momentum", "adam", "adamw", "adamw_fused", "adam_foreach", "adam_loop"} <= parts
    assert {"checkpointed", "channels_last", "compiled"} <= parts


@pytest.mark.parametrize("name", ZOO)
def test_an_entry_trains_and_traces(name: str) -> None:
    recipe = ZOO[name](1)
    work = build_workload(**recipe.arguments)
    assert run_apart(lambda: trained(work))
    step = trace_for(work, (8, 6))
    assert step.uncertainty < 0.1  # traced on tensors without memory, not run on real ones for want of values
    assert 0 < step.trace.peak(2) < step.trace.peak(200)
    assert len(set(recipe.batch_sizes)) >= 3


@pytest.mark.parametrize("family", sorted({name.split("-")[0] for name in ZOO}))
def test_at_the_scale_of_a_card_a_model_is_larger_and_still_small(family: str) -> None:
    name = next(name for name in ZOO if name.startswith(family))
    tiny, large = (numbers(ZOO[name](scale).arguments["model"]) for scale in (1, CARD_SCALE))
    assert 4 * tiny < large < 40_000_000


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_channels_last_reaches_the_batch() -> None:
    arguments = ZOO["resnet-bf16-momentum-channels_last"](1).arguments
    assert arguments["make_batch"](5)[0].is_contiguous(memory_format=torch.channels_last)
