"""What ``find`` costs beside the training steps themselves: ``python -m benchmarks.overhead``.

The sizes that a search ran are run again by hand, the same number of steps each, in a plain loop; both in one process, in turn,
so the figure is a ratio within one run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch

import autobatch
from autobatch.devices import allocator
from autobatch.examples import gpt
from autobatch.workload.batches import take_sample

BUDGET = "2GiB"
REPEATS = 3


def by_hand(arguments: dict[str, Any], sizes: Iterable[tuple[int, int]]) -> float:
    """Return the seconds that plain training steps of ``(batch size, steps)`` take."""
    model, loss_fn = arguments["model"], arguments["loss_fn"]
    sample = take_sample(arguments["sample"])
    started = time.perf_counter()
    for batch_size, steps in sizes:
        optimizer = arguments["optimizer"](model.parameters())
        for _ in range(steps):
            inputs, target = sample.grow(batch_size)
            loss = loss_fn(model(inputs), target)
            loss.backward()
            optimizer.step()
            model.zero_grad(set_to_none=True)
        del optimizer
    return time.perf_counter() - started


def measure(isolate: bool) -> dict[str, float]:
    """Return seconds in ``find``, seconds by hand for the steps that completed, and the overhead as a fraction of the latter."""
    arguments = gpt.build()
    allocator.exact_allocator()  # both sides with the allocator settings that find uses
    by_hand(arguments, [(64, 6)])  # a virtual machine's memory is slow when it is touched for the first time
    found, hand, starts = [], [], []
    for _ in range(REPEATS):
        events: list[float] = []
        started = time.perf_counter()
        plan = autobatch.find(
            **arguments, device="cpu", memory_budget=BUDGET, isolate=isolate, progress=lambda _, to=events: to.append(time.perf_counter())
        )
        found.append(time.perf_counter() - started)
        starts.append(events[0] - started)
        allocator.exact_allocator()
        failed = sum(probe.seconds or 0.0 for probe in plan.probes if not probe.outcome.fits)
        found[-1] -= failed  # a trial that ran out of memory cannot be run by hand
        hand.append(by_hand(arguments, [(probe.batch_size, probe.steps) for probe in plan.probes if probe.outcome.fits]))
    ratios = [whole / steps - 1 for whole, steps in zip(found, hand, strict=True)]
    return {
        "find": statistics.median(found),
        "start": statistics.median(starts),
        "by_hand": statistics.median(hand),
        "overhead": statistics.median(ratios),
        "spread": max(ratios) - min(ratios),
    }


def main() -> None:
    print(f"overhead of find beside its steps, example:gpt, {BUDGET}, {torch.get_num_threads()} threads, {REPEATS} runs")
    for isolate in (False, True):
        figures = measure(isolate)
        print(
            f"  {'in a worker' if isolate else 'in this process':<16}{figures['overhead']:+.1%} (find {figures['find']:.1f} s, "
            f"{figures['start']:.1f} s of it before the first trial; the same steps by hand {figures['by_hand']:.1f} s; "
            f"spread {figures['spread']:.1%})"
        )


if __name__ == "__main__":
    main()
