"""Handwritten digits, from the batch size that fits to a trained network.

    autobatch probe example:digits --json > plan.json
    python -m autobatch.examples.digits --plan plan.json

The 1,797 images of 8 × 8 pixels come with scikit-learn; nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from autobatch import BatchPlan

TEST_ROWS = 360
EPOCHS = 40


def data() -> tuple[TensorDataset, TensorDataset]:
    """Return the 1,437 images to train on and the 360 to test with, always the same ones."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_ROWS], order[TEST_ROWS:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def network() -> nn.Sequential:
    """Return a small convolutional network with batch normalisation."""

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *stage(1, 64),
        *stage(64, 64),
        *stage(64, 64),
        nn.MaxPool2d(2),
        *stage(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Return the optimizer; its learning rate is meant for batches of 256 rows."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)


def build() -> dict[str, Any]:
    """Return ``find``'s arguments: the model, a loader over the images, the loss and the optimizer."""
    train, _ = data()
    return {
        "model": network(),
        "sample": DataLoader(train, batch_size=32, shuffle=True),
        "loss_fn": F.cross_entropy,
        "optimizer": sgd,
        "base_lr": 0.1,
        "base_batch_size": 256,
        "epochs": EPOCHS,
    }


def train(plan: BatchPlan) -> float:
    """Train with the plan's batch size and learning rate, and return the share of test images that are named rightly."""
    torch.manual_seed(0)
    images, test = data()
    device = torch.device(plan.device)
    model = network().to(device)
    optimizer = sgd(model.parameters())
    loader = DataLoader(images, batch_size=plan.batch_size, shuffle=True, drop_last=plan.last_batch_size == 1)
    plan.apply(optimizer)
    warmup = plan.warmup(optimizer)
    for _ in range(plan.epochs or EPOCHS):
        model.train()
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs.to(device)), labels.to(device)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            warmup.step()
    return accuracy(model, test, device)


def accuracy(model: nn.Module, test: TensorDataset, device: torch.device) -> float:
    """Return the share of ``test`` that ``model`` names rightly."""
    images, labels = test.tensors
    model.eval()
    with torch.no_grad():
        answers: Tensor = model(images.to(device)).argmax(1).cpu()
    return float((answers == labels).float().mean())


def main() -> None:
    """Read a plan, train with it, and print what came out."""
    parser = argparse.ArgumentParser(description="Train the digits network with a plan of autobatch probe example:digits --json.")
    parser.add_argument("--plan", type=Path, required=True, help="the plan's file")
    plan = BatchPlan.from_json(parser.parse_args().plan.read_text())
    print(
        f"batch size {plan.batch_size}, learning rate {plan.lr:.4g}, {plan.iterations_per_epoch} iterations an epoch, {plan.epochs} epochs"
    )
    print(f"test accuracy {train(plan):.1%}")


if __name__ == "__main__":
    main()
