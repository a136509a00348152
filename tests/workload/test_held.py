"""What a step changes beside model and optimizer is put back; what it only keeps for itself is not touched."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import autobatch
from autobatch.workload.held import held_by

CENTRES = nn.Parameter(torch.zeros(3))
ROWS = torch.zeros(5 * 2**20)


def uses_globals(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).sum() + CENTRES.sum() + ROWS[0]


class Trainer:
    def __init__(self) -> None:
        self.average, self.log, self.dice = AveragedModel(nn.Linear(2, 2)), [], random.Random(3)

    def step(self, model: nn.Module, batch: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        loss: torch.Tensor = model(batch).sum() * (1 if scale is None else scale)
        self.average.update_parameters(model)
        self.log.append(self.dice.random())
        return loss


def test_the_moving_average_and_the_generator_that_a_step_uses_are_put_back_its_log_is_not() -> None:
    trainer, model = Trainer(), nn.Linear(2, 2)
    before = {name: value.clone() for name, value in trainer.average.state_dict().items()}
    dice = trainer.dice.getstate()
    autobatch.find(model, torch.ones(1, 2), step=trainer.step, max_batch_size=2, memory_budget="64MiB", device="cpu", isolate=False)
    after = trainer.average.state_dict()
    assert {name: value.tolist() for name, value in after.items()} == {name: value.tolist() for name, value in before.items()}
    assert trainer.dice.getstate() == dice
    assert len(trainer.log) > 2


def closed_over(average: nn.Module) -> Any:
    def step(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return average(model(batch)).sum()

    return step


def test_what_is_held_is_found_in_every_place_a_function_names() -> None:
    trainer, average, scale = Trainer(), nn.Linear(2, 2), torch.ones(())
    assert held_by(uses_globals) == (CENTRES,)
    assert held_by(closed_over(average)) == (average,)
    assert held_by(trainer.step) == (trainer.average, trainer.dice)
    assert [value is scale for value in held_by(functools.partial(trainer.step, scale=scale))] == [True, False, False]
    assert held_by(average, None) == (average,)


@pytest.mark.parametrize("function", [None, len, "no function", Trainer])
def test_nothing_is_held_by_what_names_nothing(function: Any) -> None:
    assert held_by(function) == ()
