"""Where a search spends its time beside the training steps: ``python -m benchmarks.where_time_goes``.

One search of a command line's kind (worker, CPU), its events timed from outside: what passes before the first trial, inside trials but
outside of steps, between trials (a worker is replaced after each trial that did not fit), and at the end. And, one by one, what a start is
made of, each in a fresh process.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

from autobatch.core.options import PlanRequest, SearchOptions
from autobatch.core.records import Probe, Setting, Trying
from autobatch.loop import Run
from autobatch.probe.worker import WorkerProber

SEARCHES = {"example:gpt": "2GiB", "example:digits": "96MiB"}
STARTS = {
    "the interpreter": "pass",
    "autobatch": "import autobatch.cli",
    "torch": "import torch",
    "torch._dynamo, which the first optimizer loads": "import torch; start = time.perf_counter(); import torch._dynamo",
}


def parts_of(target: str, budget: str) -> dict[str, float]:
    """Return the seconds of one search by what they were spent on."""
    events: list[tuple[float, Setting | Trying | Probe]] = []
    began = time.perf_counter()
    prober = WorkerProber(target=target, options={"device": "cpu", "memory_budget": budget}, stderr=lambda _: None)
    run = Run(prober, PlanRequest(), SearchOptions(), lambda event: events.append((time.perf_counter(), event)))
    run.plan()
    done = time.perf_counter()
    prober.close()
    closed = time.perf_counter()
    asked = [at for at, event in events if isinstance(event, Trying)]
    answered = [at for at, event in events if isinstance(event, Probe)]
    waited = sum(answer - ask for ask, answer in zip(asked, answered, strict=True))
    trials = sum(probe.seconds or 0.0 for probe in run.probes)
    # A trial that failed, and each trial's first step, count whole: what they do is training.
    steps = sum(
        (probe.seconds or 0.0) if probe.seconds_per_step is None else min(probe.seconds or 0.0, probe.seconds_per_step * probe.steps)
        for probe in run.probes
    )
    return {
        "start of the worker, loading the workload, first small step": events[0][0] - began,
        "training steps": steps,
        "in trials beside their steps": trials - steps,
        "between trials: fresh workers, messages": waited - trials,
        "the search itself": done - events[0][0] - waited,
        "end of the worker": closed - done,
    }


def seconds_of(code: str) -> float:
    """Return the seconds that ``code`` takes in a fresh process, from its start or from where it sets ``start``."""
    script = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    return min(float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout) for _ in range(3))


def snapshot_seconds(gib: float = 1.0) -> tuple[float, float]:
    """Return the seconds that a snapshot of a model and its optimizer's state takes, and putting it back."""
    import torch
    from torch import nn

    from autobatch.workload.state import Snapshot

    rows = int(gib * 2**30 / 4 / 3 / 4096)  # weights and two moments, 4 bytes each
    model = nn.Linear(4096, rows, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4096)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    taken: list[Snapshot] = []
    return timed(lambda: taken.append(Snapshot(model, optimizer, torch.device("cpu")))), timed(lambda: taken[0].restore())


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    for target, budget in SEARCHES.items():
        parts = parts_of(target, budget)
        whole = sum(parts.values())
        print(f"{target}, {budget}: {whole:.1f} s")
        for what, seconds in parts.items():
            print(f"  {seconds:7.2f} s  {seconds / whole:6.1%}  {what}")
    print("starting, each in a fresh process, the best of three")
    for what, code in STARTS.items():
        seconds = timed(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True)) if code == "pass" else seconds_of(code)
        print(f"  {seconds:7.2f} s  {what}")
    taken, back = snapshot_seconds()
    print(f"a snapshot of 1 GiB in this process: {taken:.2f} s, put back {back:.2f} s")


if __name__ == "__main__":
    main()
