"""Answers for cards that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autobatch
from autobatch import InvalidRequest, NoBatchSizeFits, WorkloadFailed
from autobatch.core.units import GIB, MIB
from autobatch.simulate.cards import find_card, known_cards


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 4096), nn.GELU(), nn.Linear(4096, 4096), nn.GELU(), nn.Linear(4096, 10))


SAMPLE = torch.randn(4, 256), torch.randint(10, (4,))


def estimate(gpu: Any = "8GiB", **options: Any) -> Any:
    return autobatch.estimate(model(), SAMPLE, gpu=gpu, **{"loss_fn": F.cross_entropy, "optimizer": torch.optim.SGD, **options})


def test_there_are_cards_enough_and_each_says_where_its_figure_is_from() -> None:
    cards = known_cards()
    assert len(cards) >= 30
    assert len({card.name for card in cards}) == len(cards)
    for card in cards:
        assert 2 * GIB < card.total < 300 * GIB
        assert (5, 0) <= card.capability <= (13, 0)
        assert card.source.startswith(("assumption: ", "PyTorch ", "nvidia", "NVIDIA", "github", "torch"))
        assert find_card(card.name) is find_card(card.name.upper())


def test_an_unknown_card_offers_the_closest_names() -> None:
    with pytest.raises(InvalidRequest, match=r"There is no card 'rtx309' in the table\. Did you mean rtx3090"):
        find_card("rtx309")
    assert find_card("24GiB").total == 24 * GIB


def test_an_estimate_is_a_plan_with_an_interval_and_says_that_it_is_one() -> None:
    plan = estimate()
    assert (plan.evidence, plan.limited_by) == ("simulated", "memory")
    assert plan.low <= plan.batch_size <= plan.high
    assert plan.low < plan.high < 1.2 * plan.low
    assert plan.peak_reserved <= plan.cap
    assert any(note.startswith("simulated: ") for note in plan.notes)
    # Two hidden layers are kept, before and after GELU, and the backward pass adds as much as two more.
    assert 5 * 4096 * 4 < plan.peak_allocated / plan.batch_size < 8 * 4096 * 4
    assert autobatch.BatchPlan.from_json(plan.to_json()) == plan


def test_more_memory_or_half_the_precision_takes_more_rows() -> None:
    small, large = estimate(["8GiB", "24GiB"])
    assert 2.5 * small.batch_size < large.batch_size < 4 * small.batch_size
    assert estimate(precision="bf16").batch_size > 1.2 * small.batch_size
    assert estimate(memory_budget="4GiB").batch_size < 0.6 * small.batch_size


def test_nothing_of_the_model_is_touched() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    before = [p.detach().numpy().tobytes() for p in net.parameters()]
    autobatch.estimate(net, SAMPLE, gpu="8GiB", loss_fn=F.cross_entropy, optimizer=optimizer)
    assert [p.detach().numpy().tobytes() for p in net.parameters()] == before
    assert optimizer.state == {}


def test_a_card_that_is_too_small_says_what_is_missing_and_which_would_do() -> None:
    with pytest.raises(NoBatchSizeFits, match="Not even batch size 1 fits") as caught:
        autobatch.estimate(nn.Linear(8192, 8192), torch.randn(1, 8192), gpu="1500MiB", optimizer=torch.optim.AdamW)
    assert caught.value.needed is not None
    # Weight, gradient, two moments, AdamW's temporary; and the context.
    assert 5 * 4 * 8192**2 + 426 * MIB < caught.value.needed < 6 * 4 * 8192**2 + 600 * MIB
    assert "a card of 1500MiB has 1.46 GiB" in str(caught.value)
    offered = str(caught.value).rsplit(" ", 1)[1].rstrip(".")
    total = {card.name: card.total for card in known_cards()}
    assert total[offered] == min(size for size in total.values() if size >= caught.value.needed)


def test_of_several_cards_the_ones_that_are_too_small_say_so_in_their_place() -> None:
    small, large = autobatch.estimate(
        nn.Linear(8192, 8192), torch.randn(1, 8192), gpu=["1GiB", "8GiB"], optimizer=torch.optim.AdamW, margin=0.0
    )
    assert isinstance(small, NoBatchSizeFits)
    assert large.batch_size > 1000


def estimate_step(step: Any) -> Any:
    return autobatch.estimate(model(), SAMPLE, gpu="8GiB", step=step)


def loss_of(net: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def reading(net: nn.Module, batch: Any) -> torch.Tensor:
    loss = loss_of(net, batch)
    assert loss.item() > 0
    return loss


def masking(net: nn.Module, batch: Any) -> torch.Tensor:
    out = net(batch[0])
    return out[out > -1e9].square().mean() + 0 * torch.unique(batch[1]).sum()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(rows.numpy() * 2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * 2


def custom(net: nn.Module, batch: Any) -> torch.Tensor:
    return Doubled.apply(net(batch[0])).square().mean()  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize(("step", "named"), [(reading, "aten._local_scalar_dense"), (masking, "aten."), (custom, "numpy")])
def test_a_step_that_depends_on_values_is_run_on_real_tensors_and_says_so(step: Any, named: str) -> None:
    plan, plain = estimate_step(step), estimate_step(loss_of)
    (note,) = (note for note in plan.notes if "so it was run on real CPU tensors at 4 and 8 rows" in note)
    assert named in note
    assert 0.5 * plain.batch_size < plan.batch_size < 1.1 * plain.batch_size
    assert plan.high - plan.low > plain.high - plain.low


def test_a_step_that_names_cuda_and_asks_for_autocast_runs_as_it_would_there() -> None:
    def step(net: nn.Module, batch: Any) -> torch.Tensor:
        inputs, target = batch[0].cuda(), batch[1].to("cuda:0", non_blocking=True)
        assert torch.zeros(1, device="cuda").sum().requires_grad is False
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = net(inputs)
            assert out.dtype == torch.bfloat16
            loss = F.cross_entropy(out, target)
        torch.cuda.synchronize()
        return loss

    plain = estimate(["8GiB"], optimizer=None, precision="bf16")[0]
    assert estimate_step(step).batch_size == pytest.approx(plain.batch_size, rel=0.01)


def test_a_step_that_ends_its_process_or_raises_is_told_and_not_survived_by_it_alone() -> None:
    with pytest.raises(WorkloadFailed, match="the process was ended by signal SIGABRT in which it was traced"):
        estimate_step(lambda net, batch: os.abort())
    with pytest.raises(WorkloadFailed, match="The training step raised KeyError on 4 rows: 'nothing'") as caught:
        estimate_step(lambda net, batch: {}["nothing"])
    assert "KeyError" in caught.value.traceback_text


def test_what_a_step_prints_is_shown_once(capfd: pytest.CaptureFixture[str]) -> None:
    def step(net: nn.Module, batch: Any) -> torch.Tensor:
        print("a step")
        return loss_of(net, batch)

    estimate_step(step)
    assert capfd.readouterr().out == "a step\n"


def test_a_context_that_was_measured_counts_in_place_of_the_assumption() -> None:
    more = estimate(["8GiB"], context="2GiB")[0]
    assert more.budget == 6 * GIB
    assert more.batch_size < estimate(["8GiB"])[0].batch_size


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "autobatch", "estimate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_the_command_line_shows_a_table_and_gives_json() -> None:
    done = run("example:gpt", "--gpu", "rtx3090", "--gpu", "24GiB", "--precision", "bf16")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["card", "memory", "batch", "size", "interval", "peak", "allocated", "limited", "by"]
    assert [line.split()[0] for line in lines[1:]] == ["rtx3090", "24GiB"]
    plans = json.loads(run("example:digits", "--all-gpus", "--json").stdout)
    assert [plan["device"] for plan in plans] == [card.name for card in known_cards()]
    assert {plan["limited_by"] for plan in plans} == {"dataset"}


def test_an_explanation_says_where_the_bytes_are_and_what_would_change_it() -> None:
    done = run("example:gpt", "--gpu", "24GiB", "--explain")
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    kinds = ("activation", "temporary", "parameter", "optimizer state", "cuBLAS workspace", "reserved but unusable")
    assert all(any(line.startswith(kind) for line in lines) for kind in kinds)
    changes = {line.split(" with ")[1]: line.split()[3] for line in lines if line.startswith("batch ") and " → " in line}
    assert set(changes) == {
        "bf16 autocast",
        "activation checkpointing of its blocks",
        "SGD without momentum",
        "8-bit AdamW",
        "fused AdamW",
        "expandable segments",
        "sequences of 64 instead of 128",
    }
    now = int(next(line for line in lines if line.startswith("24GiB")).split()[3].replace(",", ""))
    assert int(changes["bf16 autocast"].replace(",", "")) > now
    assert int(changes["activation checkpointing of its blocks"].replace(",", "")) > now


def test_allocator_settings_of_the_environment_count() -> None:
    plain, growing = (
        json.loads(run("example:gpt", "--gpu", "24GiB", "--precision", "bf16", "--json", PYTORCH_CUDA_ALLOC_CONF=conf).stdout)[0]
        for conf in ("", "expandable_segments:True")
    )
    assert growing["peak_reserved"] - growing["peak_allocated"] < plain["peak_reserved"] - plain["peak_allocated"]
    assert growing["batch_size"] > plain["batch_size"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("example:gpt",), 2, "Which card? Give --gpu rtx4090, --gpu 24GiB or --all-gpus."),
        (("example:gpt", "--gpu", "rtx309"), 2, "Did you mean rtx3090"),
        (("example:gpt", "--gpu", "100MiB"), 4, "Not even batch size 1 fits"),
        (("nowhere.py:build", "--gpu", "24GiB"), 2, "There is no file 'nowhere.py'"),
    ],
)
def test_what_cannot_be_estimated_has_its_code_and_one_message(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
