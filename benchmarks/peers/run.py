"""Runs every finder on every piece of work, each in a process of its own with a time limit, and gathers what came out."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.peers.cases import DRAWN
from benchmarks.peers.finders import Finder, finders

# Seconds a process may take: all cases of a finder, and one search on a device.
_SIMULATED, _REAL = 900.0, 300.0
_START = "import gc; gc.disable(); from benchmarks.peers.child import main; main()"
# Training steps that an answer has to last on a processor, and on a card.
LASTS, LASTS_ON_A_CARD = 20, 200
# Answers this far from the scanned largest need not be run again to know.
_SURELY = (0.99, 1.1)
MODES = ("by errors", "with readings")


def child(task: dict[str, Any], limit: float) -> tuple[list[dict[str, Any]], str]:
    """Return the documents that a process with ``task`` wrote, and what was wrong with it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", _START, json.dumps(task)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment, check=False)
        output, wrong = done.stdout, "" if done.returncode == 0 else f"exit status {done.returncode}: {_last_line(done.stderr)}"
    except subprocess.TimeoutExpired as late:
        output, wrong = (late.stdout or b"").decode(errors="replace"), f"no answer within {limit:g} s"
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")], wrong


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:200]


def missing(finder: Finder) -> str:
    """Return why ``finder`` cannot run here, nothing where it can."""
    if finder.module and importlib.util.find_spec(finder.module) is None:
        return f"not installed: pip install {finder.package}"
    return ""


def simulated(chosen: Iterable[Finder], count: int, jobs: int) -> list[dict[str, Any]]:
    """Return a row for every finder and mode: its searches of all cases.

    With readings, a finder that reads nothing runs the special cases only, to show that they make no difference to it.
    """

    def row(pair: tuple[Finder, str]) -> dict[str, Any]:
        finder, mode = pair
        why = missing(finder) or ("" if "simulated" in finder.on else "an estimator: it needs a real architecture, not a formula")
        searches: list[dict[str, Any]] = []
        if not why:
            readings = mode == MODES[1]
            task = {"do": "simulated", "finder": finder.name, "cases": count if finder.reads or not readings else 0, "readings": readings}
            searches, why = child(task, _SIMULATED)
        _say(f"{finder.name}, {mode}: {len(searches)} cases {why}")
        return {"finder": finder.name, "mode": mode, "why": why, "searches": searches}

    asked = [finder for finder in chosen if "simulated" in finder.on or not finder.needs_readings]
    pairs = [(finder, mode) for finder in asked for mode in MODES if mode == MODES[1] or not finder.needs_readings]
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(row, pairs))


def on_device(chosen: Iterable[Finder], models: Sequence[Any], timed_jobs: int, jobs: int) -> list[dict[str, Any]]:
    """Return what every finder found on every model, what is true, and whether the answer lasted.

    Searches are timed, ``timed_jobs`` side by side; what is true is not, and is looked for ``jobs`` side by side.
    """

    def search(pair: tuple[Any, Finder]) -> dict[str, Any]:
        spec, finder = pair
        where, why = _place(spec), missing(finder)
        found, wrong = ([], why) if why else child({"do": "search", "finder": finder.name, **where}, _REAL)
        _say(f"{spec.name}, {finder.name}: {found[0]['answer'] if found else wrong} {found[0]['error'] if found else ''}")
        return {"finder": finder.name, **where, "why": wrong, "search": found[0] if found else None}

    asked = [finder for finder in chosen if "real" in finder.on and not finder.shipped]
    pairs = [(spec, finder) for number, spec in enumerate(models) for finder in asked if finder.models is None or number < finder.models]
    with ThreadPoolExecutor(timed_jobs) as pool:
        rows = list(pool.map(search, pairs))
    with ThreadPoolExecutor(jobs) as pool:
        truths = pool.map(lambda spec: _truth(spec, rows), models)
        known = {(spec.name, spec.limit): truth for spec, truth in zip(models, truths, strict=True)}
    for row in rows:
        answer = (row["search"] or {}).get("answer")
        row["largest"], lasting = known[row["model"], row["limit"]]
        row["lasts"] = lasting.get(str(answer)) if answer else None
    return rows


def _place(spec: Any) -> dict[str, Any]:
    return {"model": spec.name, "device": spec.device, "limit": spec.limit}


def _truth(spec: Any, rows: list[dict[str, Any]]) -> tuple[int | None, dict[str, bool]]:
    """Return the largest size that lasts, by a scan, and whether each answer does, in processes that do nothing else."""
    steps = LASTS if spec.device == "cpu" else LASTS_ON_A_CARD
    found = {(row["search"] or {}).get("answer") for row in rows if (row["model"], row["limit"]) == (spec.name, spec.limit)}
    answers = sorted(answer for answer in found if answer)
    task = {"do": "truth", "steps": steps, "sizes": answers, "near": _SURELY, **_place(spec)}
    told, wrong = child(task, 4 * _REAL)
    largest, lasting = (told[0]["largest"], told[0]["lasts"]) if told else (None, {})
    verdicts = {str(answer): lasting.get(str(answer), answer < largest) for answer in answers if largest is not None}
    # What lasted when it was run alone is no more than the largest, whatever the scan's last row said.
    largest = max([largest or 0, *(int(size) for size, fits in verdicts.items() if fits)])
    _say(f"{spec.name}: the largest is {largest} {wrong}")
    return largest, verdicts


def everything(
    *,
    count: int = DRAWN,
    chosen: Sequence[Finder] = (),
    only: str = "",
    models: int | None = None,
    cuda: bool = False,
    jobs: int = 2,
    timed_jobs: int = 1,
) -> dict[str, Any]:
    """Return the whole run as JSON has it."""
    chosen = [finder for finder in chosen or finders() if only in finder.name]
    document: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(cuda),
        "versions": versions(),
        "finders": [{"name": f.name, "package": f.package, "options": f.options, "given": f.given} for f in chosen],
    }
    if cuda:
        from benchmarks.peers.cuda_models import CARD

        return {**document, "cuda": on_device(chosen, CARD[:models], 1, 1)}
    from benchmarks.peers.models import PROCESSOR

    formulas = simulated(chosen, count, jobs) if count else []
    before = _load()
    real = on_device(chosen, PROCESSOR[:models], timed_jobs, jobs)
    return {
        **document,
        "cases": count,
        "simulated": formulas,
        "real": real,
        "timed_jobs": timed_jobs,
        "load": [before, _load()],
    }


def machine(cuda: bool) -> str:
    """Return the class of machine, as far as figures depend on it."""
    if cuda:
        import torch

        return str(torch.cuda.get_device_name())
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Return what was installed."""
    names = {"torch", *(finder.package for finder in finders() if finder.package)}
    found = {"python": platform.python_version()}
    for name in sorted(names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    from autobatch import __version__

    return {"autobatch": __version__, **found}


def _load() -> float:
    """Return how many processes wanted a core, over the last minute."""
    return round(os.getloadavg()[0], 1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
