"""Batches that wait in host memory: counted on the CPU, refused beside a card, named in the answer."""

from __future__ import annotations

from typing import Any

import psutil
import pytest
import torch
from played_card import Card, Driver
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch import Outcome
from autobatch.core.units import MIB
from autobatch.devices.cuda import CudaDevice
from autobatch.devices.nvml import Nvml
from autobatch.probe.inline import InlineProber
from autobatch.workload.batches import Feeding, feeding_of, host_bytes
from autobatch.workload.workload import build_workload

ROW = 2**18  # floats: a MiB


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(64, ROW)), batch_size=4, **options)


def first(model: nn.Module, batch: Any) -> torch.Tensor:
    return (model.weight * batch[0][:, :4]).sum()  # type: ignore[operator, union-attr]


def beside_a_card(feeding: dict[str, Any]) -> InlineProber:
    device = CudaDevice(0, cuda=Card(), nvml=Nvml(Driver([])))
    device.name = "cpu"  # tensors are here; the memory is the played card's
    return InlineProber(build_workload(nn.Linear(4, 1), loader(**feeding), step=first), device)


@pytest.mark.parametrize(
    ("options", "feeding", "waiting"),
    [
        ({}, Feeding(0, 0, False), 0),
        ({"pin_memory": True}, Feeding(0, 0, True), 1),
        ({"num_workers": 2}, Feeding(2, 2, False), 4),
        ({"num_workers": 2, "prefetch_factor": 5, "pin_memory": True}, Feeding(2, 5, True), 11),
    ],
)
def test_a_loader_tells_how_many_batches_it_keeps_ready(options: dict[str, Any], feeding: Feeding, waiting: int) -> None:
    assert feeding_of(loader(**options)) == feeding
    assert feeding.waiting == waiting
    assert feeding_of(torch.ones(2)) == Feeding()


def test_bytes_on_the_host_are_those_of_every_leaf() -> None:
    assert host_bytes({"a": torch.ones(2, 3), "b": [torch.ones(2, dtype=torch.int8)]}) == 26


def test_batches_that_fit_the_card_and_not_the_ram_are_out_of_host_memory() -> None:
    prober = beside_a_card({"num_workers": 2, "prefetch_factor": 4, "pin_memory": True})
    try:
        assert prober.probe(2).outcome is Outcome.FIT
        rows = psutil.virtual_memory().total // MIB // 5  # ten batches of it are twice the RAM
        probe = prober.probe(rows)
    finally:
        prober.close()
    assert (probe.outcome, probe.steps) == (Outcome.HOST_OOM, 0)
    assert probe.message.startswith("the batches that the data loader keeps in host memory (2 workers × 4, 1 pinned, 1 in use) need ")


def test_on_the_cpu_they_share_the_memory_of_the_step() -> None:
    def largest(**options: Any) -> Any:
        return autobatch.find(nn.Linear(4, 1), loader(**options), step=first, device="cpu", memory_budget="128MiB", dataset_size=10**6)

    alone, crowded = largest(), largest(num_workers=2)
    # A loop holds the last batch while it takes the next; beside those two, 2 × 2 wait.
    assert crowded.batch_size == pytest.approx(alone.batch_size * 2 / 6, rel=0.1)
    assert crowded.peak_allocated <= crowded.cap
    assert "the batches that the data loader keeps ready (2 workers × 2) were counted" in crowded.notes
    assert not any("data loader" in note for note in alone.notes)
