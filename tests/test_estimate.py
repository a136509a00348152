"""Answers for cards that are not here."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autobatch
from autobatch import InvalidRequest, NoBatchSizeFits, WorkloadFailed
from autobatch.core.units import GIB
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


def test_a_card_that_is_too_small_says_what_is_missing() -> None:
    with pytest.raises(NoBatchSizeFits, match="Not even batch size 1 fits"):
        autobatch.estimate(nn.Linear(32768, 32768), torch.randn(1, 32768), gpu="8GiB", optimizer=torch.optim.AdamW)


def test_a_step_that_depends_on_values_says_so() -> None:
    def step(net: nn.Module, batch: Any) -> torch.Tensor:
        out = net(batch[0])
        return out.sum() if float(out.sum()) > 0 else out.mean()

    with pytest.raises(WorkloadFailed, match="The step cannot be simulated: DataDependentOutputException"):
        autobatch.estimate(model(), SAMPLE, gpu="8GiB", step=step)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

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
    assert set(changes) == {"bf16 autocast", "activation checkpointing of its blocks", "SGD without momentum", "expandable segments"}
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
