"""The examples as the README runs them, as far as that is quick."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autobatch.core.options import PlanRequest, SearchOptions
from autobatch.core.plan import BatchPlan
from autobatch.core.units import MIB
from autobatch.examples import digits, gpt
from autobatch.loop import Run
from autobatch.probe.worker import WorkerProber
from autobatch.workload.state import resident_bytes
from autobatch.workload.workload import build_workload


def probed(target: str, budget: int, **search: int | float) -> BatchPlan:
    prober = WorkerProber(target=target, options={"device": "cpu", "memory_budget": budget}, stderr=lambda _: None)
    try:
        return Run(prober, PlanRequest(), SearchOptions(**search)).plan()  # type: ignore[arg-type]
    finally:
        prober.close()


@pytest.mark.parametrize(("budget", "largest"), [(64 * MIB, 640), (2048 * MIB, 32)])
def test_digits_train_with_the_plan_that_was_found(budget: int, largest: int, tmp_path: Path) -> None:
    plan = probed("example:digits", budget, max_batch_size=largest)
    assert plan.batch_size <= largest
    assert plan.lr == pytest.approx(0.1 * plan.batch_size / 256)
    assert plan.iterations_per_epoch == -(-1437 // plan.batch_size)
    (tmp_path / "plan.json").write_text(plan.to_json())
    command = [sys.executable, "-m", "autobatch.examples.digits", "--plan", str(tmp_path / "plan.json")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert shown[0] == (
        f"batch size {plan.batch_size}, learning rate {plan.lr:.4g}, {plan.iterations_per_epoch} iterations an epoch, 40 epochs"
    )
    assert shown[1].startswith("test accuracy ")
    assert float(shown[1].split()[-1].rstrip("%")) >= 95


def test_digits_split_is_always_the_same_and_loses_nothing() -> None:
    (train, test), (again, _) = digits.data(), digits.data()
    assert (len(train), len(test)) == (1437, 360)
    assert torch.equal(train.tensors[0], again.tensors[0])


def test_gpt_learns_and_holds_more_than_its_parameters() -> None:
    torch.manual_seed(0)
    arguments = gpt.build()
    work = build_workload(**{key: arguments[key] for key in ("model", "sample", "loss_fn", "optimizer")})
    losses = []
    for _ in range(4):
        loss, _output = work.loss(work.model, work.make_batch(2))
        assert loss is not None
        assert work.optimizer is not None
        loss.backward()  # type: ignore[no-untyped-call]
        work.optimizer.step()
        work.optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    # Parameters, both moments: batch size 1 cannot fit into 64 MiB once there are gradients too.
    parameters = sum(p.numel() * 4 for p in work.model.parameters())
    assert resident_bytes(work.model, work.optimizer) == pytest.approx(3 * parameters, rel=0.01)
    assert 4 * parameters > 64 * MIB
