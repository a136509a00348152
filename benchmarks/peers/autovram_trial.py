"""autovram runs a script again and again: the search around it, and the script, ``main``."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.finders import Work, load
from benchmarks.peers.ledger import Trial

_LEDGER, _MODEL = "AUTOBATCH_BENCH_LEDGER", "AUTOBATCH_BENCH_MODEL"
_METRIC = "batch"
# As every process of this bench, without the garbage collector while it imports.
_START = "import gc; gc.disable(); from benchmarks.peers.autovram_trial import main; main()"
# Seconds a trial may take.
_TIMEOUT = 120.0


def run_autovram(work: Work, scratch: Path, **options: Any) -> int:
    """Return autovram's answer: its own search with a script for real work, with a runner of the script's step for simulated work.

    It searches one precision of the three it would; the metric it maximises is the batch size.
    """
    tuner, types, runner = (load(f"autovram.core.{name}") for name in ("tuner", "types", "runner"))
    system = load("autovram.core.detect").detect_system()
    context = types.RunContext(
        mode="script",
        system=system,
        metric_name=_METRIC,
        timeout_s=_TIMEOUT,
        work_dir=scratch,
        exec_cwd=Path.cwd(),
        engine_name="heuristic",
    )
    spec: Any = getattr(work, "spec", None)
    ledger = scratch / "ledger.jsonl"
    os.environ[_LEDGER] = str(ledger)
    if spec is not None:
        os.environ[_MODEL] = f"{spec.device}/{spec.name}/{spec.limit}"
    best, _ = tuner.autotune_batch_size(
        context=context,
        runner=runner.SubprocessRunner() if spec is not None else _here(work, runner),
        cmd=f"{sys.executable} -c '{_START}'",
        base_config=types.AutoVRAMConfig(precision="fp32"),
        **options,
    )
    if ledger.exists():
        work.ledger.trials = [Trial(**json.loads(line)) for line in ledger.read_text().splitlines()]
    return 0 if best is None else int(best.batch_size)


def _here(work: Work, runner: Any) -> Any:
    """Return a runner that runs the script's step in this process: on a formula there is nothing to start a process for."""

    class Here:
        def run(self, cmd: str, env: dict[str, str], timeout_s: float, cwd: Path) -> Any:  # noqa: ARG002 the runner's interface
            size, said = int(env["AUTOVRAM_BATCH_SIZE"]), ""
            try:
                work.run(size)
            except torch.OutOfMemoryError as error:
                said = str(error)
            return runner.SubprocessOutcome(
                ok=not said,
                exit_code=1 if said else 0,
                timed_out=False,
                oom=load("autovram.core.oom").looks_like_oom(said),
                stdout=f"AUTOVRAM_METRIC {_METRIC}={float(size)}",
                stderr=said,
                duration_s=0.0,
            )

    return Here()


def main() -> None:
    """Train three steps at the batch size that autovram gives, as a user's script would."""
    from benchmarks.peers.models import find
    from benchmarks.peers.real import RealWork

    size = load("autovram.runtime").get_runtime_config().batch_size
    device, name, limit = os.environ[_MODEL].split("/")
    work = RealWork(find(name, device, int(limit)))
    try:
        with work.session():
            gc.enable()
            work.run(size)
    finally:
        with Path(os.environ[_LEDGER]).open("a") as file:
            for trial in work.ledger.trials:
                file.write(json.dumps({"size": trial.size, "rows": trial.rows, "begun": trial.begun, "done": trial.done}) + "\n")
    load("autovram.runtime").print_metric(**{_METRIC: size})
