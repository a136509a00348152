"""What measuring the noise scale adds to an optimizer step of eight micro-batches, in processor time: others may be on the machine."""

from __future__ import annotations

import statistics
import time

import torch

from autobatch import NoiseMeter
from autobatch.examples import gpt

MICRO_BATCHES, ROWS, PAIRS = 8, 4, 5
# The hooks may cost this much of a step.
ALLOWED = 0.05


def test_the_meter_costs_little_of_a_step(benchmark: object) -> None:
    torch.manual_seed(0)
    model = gpt.GPT()
    optimizer = gpt.adamw(model.parameters())
    batches = [torch.randint(gpt.VOCABULARY, (ROWS, gpt.CONTEXT + 1)) for _ in range(MICRO_BATCHES)]

    def step(meter: NoiseMeter | None) -> float:
        started = time.process_time()
        for rows in batches:
            (gpt.loss_fn(model(rows[:, :-1]), rows[:, 1:]) / MICRO_BATCHES).backward()  # type: ignore[no-untyped-call]
            if meter is not None:
                meter.micro_batch(ROWS)
        if meter is not None:
            meter.window()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - started

    def pair() -> float:
        """Return what the meter adds, as a share: the same step without, with, with and without it, so that a drift cancels."""
        before = step(None)
        with NoiseMeter(model) as meter:
            measured = step(meter) + step(meter)
        return measured / (before + step(None)) - 1

    step(None)
    shares = [benchmark.pedantic(pair, rounds=1)] + [pair() for _ in range(PAIRS - 1)]  # type: ignore[attr-defined]
    benchmark.extra_info["share"] = statistics.median(shares)  # type: ignore[attr-defined]
    share, least, most = (f"{pick(shares):+.1%}" for pick in (statistics.median, min, max))
    print(f"\nthe meter adds {share} ({least} – {most}) to a step of {MICRO_BATCHES} × {ROWS} rows")
    assert statistics.median(shares) <= ALLOWED
