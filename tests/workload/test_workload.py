from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from autobatch import InvalidRequest, WorkloadFailed, build_workload

X, Y = torch.ones(2, 3), torch.zeros(2, 4)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 4)


def loss_of(workload: Any, rows: int = 2) -> torch.Tensor:
    return workload.loss(workload.model, workload.make_batch(rows))[0]


class WithLoss(nn.Module):
    """Returns what models of transformers return."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        out = self.inner(x)
        return {"loss": F.mse_loss(out, labels), "logits": out}


def test_a_pair_goes_to_the_loss_function() -> None:
    net = model()
    assert torch.equal(loss_of(build_workload(net, (X, Y), loss_fn=F.mse_loss)), F.mse_loss(net(X), Y))


def test_several_inputs_are_spread() -> None:
    net = nn.Bilinear(3, 3, 4)
    assert torch.equal(loss_of(build_workload(net, ((X, X), Y), loss_fn=F.mse_loss)), F.mse_loss(net(X, X), Y))


def test_a_dict_is_passed_as_keywords_and_its_loss_used() -> None:
    net = WithLoss()
    workload = build_workload(net, {"x": X, "labels": Y})
    assert torch.equal(loss_of(workload), F.mse_loss(net.inner(X), Y))
    assert not workload.loss.stood_in


def test_without_a_loss_the_outputs_are_summed_and_that_is_kept() -> None:
    net = model()
    workload = build_workload(net, X)
    assert torch.equal(loss_of(workload), net(X).sum())
    assert workload.loss.stood_in


def test_a_step_replaces_forward_and_loss() -> None:
    workload = build_workload(model(), (X, X, X), step=lambda net, batch: net(batch[2]).mean())
    assert loss_of(workload).shape == ()


def test_eval_mode_has_no_loss_and_no_optimizer() -> None:
    workload = build_workload(model(), X, mode="eval", optimizer=torch.optim.SGD)
    assert workload.loss(workload.model, X)[0] is None
    assert workload.optimizer is None


def test_own_batches_keep_the_size_of_the_data_set() -> None:
    workload = build_workload(model(), TensorDataset(X), make_batch=lambda n: torch.ones(n, 3))
    assert (workload.make_batch(5).shape, workload.dataset_size) == ((5, 3), 2)


def test_learning_rates_come_from_the_optimizers_groups() -> None:
    net = model()
    optimizer = torch.optim.SGD([{"params": [net.weight], "lr": 0.5}, {"params": [net.bias]}], lr=0.1)
    assert build_workload(net, X, optimizer=optimizer).group_lrs == (0.5, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "model is a int; a torch.nn.Module is wanted"),
        ({"model": nn.ReLU()}, "No parameter of the model requires a gradient"),
        ({"mode": "test"}, "mode is 'test'; known: train, eval"),
        ({"precision": "fp8"}, "precision is 'fp8'; known: fp32, bf16, fp16"),
        ({"optimizer": "sgd"}, "optimizer is a str; give an Optimizer or a function"),
        ({"optimizer": torch.optim.LBFGS}, r"LBFGS runs the model several times a step.*: 100 × 2 copies of the parameters"),
        ({"optimizer": lambda params: list(params)}, r"optimizer\(params\) returned a list"),
        (
            {"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters())},
            "None of the optimizer's 2 parameters belongs to the model",
        ),
    ],
)
def test_arguments_that_cannot_be_meant_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        build_workload(**{"model": model(), "sample": (X, Y), **arguments})


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda out, y: (out - y).square(), r"loss_fn returned a tensor of shape \(2, 4\); a scalar is wanted"),
        (lambda out, y: F.mse_loss(out, y).item(), "loss_fn returned a float; a scalar tensor is wanted"),
        (lambda out, y: F.mse_loss(out, y).detach(), "loss_fn returned a loss that needs no gradient"),
    ],
)
def test_a_loss_that_cannot_be_trained_on_is_the_workloads_fault(loss_fn: Any, message: str) -> None:
    with pytest.raises(WorkloadFailed, match=message):
        loss_of(build_workload(model(), (X, Y), loss_fn=loss_fn))


def test_three_parts_with_a_loss_function_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"The sample has 3 parts; .*Give step="):
        loss_of(build_workload(model(), (X, X, Y), loss_fn=F.mse_loss))
