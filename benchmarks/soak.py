"""A training run at the answer: 1,000 steps under the limit that the answer was found under, with validation passes and checkpoints.

    python -m benchmarks.soak

On the CPU it is a test as well (tests/test_soak.py); on a card ``scripts/bench --cuda --faults`` runs it on large models.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, TensorDataset

import autobatch
from autobatch.core.units import MIB
from autobatch.devices.base import Device
from autobatch.workload.batches import to_device
from autobatch.workload.state import resident_bytes

VALIDATE, CHECKPOINT = 100, 250


@dataclasses.dataclass
class Soaked:
    """What a run did: its steps, rows, validation passes and checkpoints, and the error it ended with, if any."""

    batch_size: int
    steps: int = 0
    rows: int = 0
    validations: int = 0
    checkpoints: int = 0
    error: str = ""


def soak(
    model: nn.Module, optimizer: Optimizer, loss_of: Callable[..., Tensor], data: Dataset[Any], plan: Any, device: Device, steps: int = 1000
) -> Soaked:
    """Return what ``steps`` training steps at the plan's batch size did under its limit, on shuffled batches of ``data``."""
    done, target = Soaked(plan.batch_size), torch.device(device.name)
    model.to(target)
    batches = _endless(DataLoader(data, batch_size=plan.batch_size, shuffle=True, drop_last=True))
    try:
        with device.session(), device.cap(plan.cap, resident_bytes(model, optimizer)), tempfile.TemporaryDirectory() as folder:
            for step in range(1, steps + 1):
                batch = to_device(next(batches), target)
                loss = loss_of(model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                done.steps, done.rows = step, done.rows + plan.batch_size
                if step % VALIDATE == 0:
                    done.validations += _validate(model, loss_of, batch)
                if step % CHECKPOINT == 0:
                    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, Path(folder) / "last.pt")
                    done.checkpoints += 1
    except Exception as error:  # noqa: BLE001 whatever ends a training run is what this is for
        done.error = f"{type(error).__name__}: {error}"
    return done


def _endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _validate(model: nn.Module, loss_of: Callable[..., Tensor], batch: Any) -> int:
    model.eval()
    with torch.no_grad():
        loss_of(model, batch)
    model.train()
    return 1


def network() -> nn.Module:
    """Return a small convolutional network with batch normalisation and dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(12, 12, 3, padding=1),
        nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Return the cross entropy of one batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    """Find, soak on the CPU, and print what came out as JSON."""
    from autobatch.devices.cpu import CpuDevice

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(600, 3, 12, 12), torch.randint(0, 10, (600,)))
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    plan = autobatch.find(model, data, step=loss_of, optimizer=optimizer, device="cpu", memory_budget=8 * MIB)
    # As in the worker that found the answer: what libraries take on first use is no part of the step.
    for _ in range(2):
        loss_of(model, data[:4]).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    json.dump({**dataclasses.asdict(soak(model, optimizer, loss_of, data, plan, CpuDevice())), "limited_by": plan.limited_by}, sys.stdout)


if __name__ == "__main__":
    from autobatch.devices.allocator import exact_allocator

    exact_allocator()
    main()
