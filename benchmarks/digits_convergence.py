"""Does a plan's batch size train as well as the one it was scaled from? ``example:digits``, with and without what the plan scales.

    python -m benchmarks.digits_convergence

Trains at a batch of 32, at the plan's batch with linear scaling and warm-up, and at the plan's batch with the learning rate as it was;
the same number of epochs and several seeds. Takes some minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F

import autobatch
from autobatch.examples.digits import accuracy, data, network

BASE_LR, BASE_BATCH, BATCH, EPOCHS = 0.002, 32, 512, 20


@dataclass(frozen=True)
class Result:
    accuracy: float
    iterations: int
    seconds: float


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=BASE_LR, momentum=0.9, nesterov=True, weight_decay=1e-4)  # type: ignore[arg-type]


def plan_for(batch: int, lr_rule: str) -> autobatch.BatchPlan:
    train, _ = data()
    return autobatch.find(
        network(), train, loss_fn=F.cross_entropy, optimizer=sgd, device="cpu", steps=2,
        base_batch_size=BASE_BATCH, lr_rule=lr_rule, global_batch_size=batch, epochs=EPOCHS,
    )  # fmt: skip


def train(plan: autobatch.BatchPlan, seed: int) -> Result:
    torch.manual_seed(seed)
    rows, test = data()
    model = network()
    optimizer = sgd(model.parameters())
    plan.apply(optimizer)
    warmup = plan.warmup(optimizer)
    loader = plan.dataloader(rows)
    assert plan.accumulation_steps == 1
    iterations, begin = 0, time.perf_counter()
    for _ in range(EPOCHS):
        model.train()
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            warmup.step()
            iterations += 1
    return Result(accuracy(model, test, torch.device("cpu")), iterations, time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    runs = {
        f"batch {BASE_BATCH}": plan_for(BASE_BATCH, "linear"),
        f"batch {BATCH}, linear, warm-up": plan_for(BATCH, "linear"),
        f"batch {BATCH}, not scaled": plan_for(BATCH, "none"),
    }
    # Seed by seed, so that whatever else the machine does meets all runs alike.
    rounds = [{name: train(plan, seed) for name, plan in runs.items()} for seed in seeds]
    print(f"{'run':<28}{'learning rate':>14}{'iterations':>12}{'seconds':>9}{'test accuracy':>15}  by seed")
    means = []
    for name, plan in runs.items():
        results = [one[name] for one in rounds]
        means.append(statistics.mean(result.accuracy for result in results))
        seconds = statistics.median(result.seconds for result in results)
        by_seed = " ".join(f"{result.accuracy:.1%}" for result in results)
        print(f"{name:<28}{plan.lr:>14.4g}{results[0].iterations:>12,}{seconds:>9.1f}{means[-1]:>15.2%}  {by_seed}")
    same, lost = 100 * (means[1] - means[0]), 100 * (means[2] - means[0])
    print(f"scaled: {same:+.2f} points against batch {BASE_BATCH}; not scaled: {lost:+.2f} points")
    if abs(same) > 1 or lost > -1:
        raise SystemExit("the claim does not hold: scaled within 1 point, not scaled more than 1 point worse")


if __name__ == "__main__":
    main()
