"""What is expected before anything runs, and where the real search begins with it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

from autobatch.core.options import PlanRequest, SearchOptions
from autobatch.core.records import Probe
from autobatch.devices.cpu import CpuDevice
from autobatch.loop import Run
from autobatch.probe.inline import InlineProber
from autobatch.simulate.foresight import Expected, foreseeing
from autobatch.workload.workload import Workload, build_workload

LONG = 60.0  # seconds, for a machine that does other things as well


def workload(step: Any = None) -> Workload:
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(256, 256), nn.Tanh())))
    return build_workload(
        model, torch.randn(4, 256), step=step or (lambda model, rows: model(rows).square().mean()), optimizer=torch.optim.Adam
    )


def foresee(work: Workload, capability: tuple[int, int] | None, seconds: float = LONG) -> tuple[Expected, str]:
    with foreseeing(work, capability, seconds) as foreseen:
        return foreseen()


def test_the_expected_bytes_are_those_of_the_step() -> None:
    expected, note = foresee(workload(), (8, 0), LONG)
    parameters = 8 * (256 * 256 + 256) * 4
    rows = dict(expected)
    assert rows[1] > 4 * parameters  # parameters, gradients, two moments
    kept = 1024 * (8 + 1)  # the input of every layer and the batch, 1 KiB a row each
    assert kept < (rows[2**16] - rows[2**15]) / 2**15 < 2 * kept
    assert note.startswith("a simulation beforehand expected ")


def test_what_is_no_card_is_not_simulated() -> None:
    assert foresee(workload(), None) == ((), "")
    assert CpuDevice().capability is None


@pytest.mark.parametrize(
    ("step", "seconds", "reason"),
    [
        (lambda model, rows: os.abort(), LONG, "Died: the process was ended by signal SIGABRT"),
        (
            lambda model, rows: (model(rows).sum(), model(rows).sum().item())[0],
            LONG,
            "DataDependentOutputException: aten._local_scalar_dense.default",
        ),
        (None, 0.0, "TookTooLong: the time was up"),
    ],
)
def test_a_step_that_cannot_be_traced_in_time_is_searched_as_any_other(step: Any, seconds: float, reason: str) -> None:
    assert foresee(workload(step), (8, 0), seconds) == (
        (),
        f"not simulated beforehand ({reason}), so the search began at the smallest size",
    )


def test_a_real_search_begins_near_the_answer() -> None:
    """Real trials under a real limit: the first near half of what was expected to fit, the answer after one or two more."""
    work = workload()
    expected, note = foresee(work, (8, 0), LONG)
    seen: list[int] = []

    def see(event: object) -> None:
        if isinstance(event, Probe) and not event.confirmation:
            seen.append(event.batch_size)

    prober = InlineProber(work, CpuDevice(), memory_budget="256MiB", margin=0.0, foreseen=lambda: (expected, note))
    try:
        plan = Run(prober, PlanRequest(), SearchOptions(), see).plan()
    finally:
        prober.close()
    assert seen[0] in range(int(0.3 * plan.batch_size), int(0.6 * plan.batch_size))
    assert seen[1] > 0.8 * plan.batch_size
    assert note in plan.notes
