"""One finder in a process of its own: ``main`` takes its task from the command line and writes one JSON document a line.

The process begins without the garbage collector, which takes a third of the time that imports take; each search has it.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.peers import card, real
from benchmarks.peers.cases import cases
from benchmarks.peers.finders import Finder, Work, by_name, load
from benchmarks.peers.ledger import Search, summed_up
from benchmarks.peers.models import find
from benchmarks.peers.peer_finders import silent
from benchmarks.peers.simulated import SimulatedWork

# Seconds a search on a formula may take before the finder is held to hang.
_HANGS = 60


class _Hangs(BaseException):
    """The search took too long; no ``Exception``, because some finders take every one for running out of memory."""


def state_of(model: nn.Module) -> dict[str, str]:
    """Return digests of everything about ``model`` and this process that a search has no business to change."""

    def digest(*values: Any) -> str:
        raw = b"".join(v.detach().cpu().numpy().tobytes() if isinstance(v, torch.Tensor) else repr(v).encode() for v in values)
        return hashlib.blake2b(raw, digest_size=8).hexdigest()

    return {
        "weights": digest(*model.parameters()),
        "buffers": digest(*model.buffers()),
        "gradients": digest(*(p.grad is None for p in model.parameters())),
        "modes": digest(*(module.training for module in model.modules())),
        "random state": digest(torch.get_rng_state(), random.getstate(), *np.random.get_state()),
    }


def search(finder: Finder, work: Work, name: str, model: nn.Module, *, timed: bool) -> Search:
    """Return how ``finder`` did on ``work``; what it raises is its answer."""
    before, held = state_of(model), _held()
    gc.enable()
    answer, error = None, ""
    started, processor = time.perf_counter(), _processor()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            answer = finder.call(work, Path(scratch))
        except _Hangs:
            error = f"no answer within {_HANGS} s"
        except Exception as raised:  # noqa: BLE001 a finder that breaks is a row of the results
            error = f"{type(raised).__name__}: {str(raised).splitlines()[0] if str(raised) else ''}"[:200]
    seconds, processor = time.perf_counter() - started, _processor() - processor
    after = state_of(model)
    changed = [what for what, was in before.items() if after[what] != was] if finder.given == "model" else None
    del before, after
    return summed_up(
        name,
        answer,
        work.ledger.trials,
        seconds=round(seconds, 3) if timed else None,
        processor=round(processor, 3) if timed else None,
        changed=changed,
        left=max(0, _held() - held) if timed else None,
        error=error,
    )


def _processor() -> float:
    """Return the processor seconds of this process and of the children that have ended."""
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def _held() -> int:
    """Return the bytes this process holds once everything that can be freed is."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        return int(torch.cuda.memory_allocated())
    from autobatch.devices.allocator import trim

    trim()
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))


def simulated(finder: Finder, count: int, readings: bool) -> None:
    """Let ``finder`` search all cases and write each search as a line."""
    signal.signal(signal.SIGALRM, _too_long)
    if finder.module:
        load(finder.module)
        silent()  # again: some set their own level of talking when they are imported
    import torch._dynamo  # what the first optimizer loads  # noqa: F401

    gc.freeze()  # many finders collect garbage in every trial; what was imported is none
    for case in cases(count):
        signal.alarm(_HANGS)
        with card.inserted(case) as inserted:
            work = SimulatedWork(inserted, readable=readings)
            with card.torch_cuda(inserted) if readings else contextlib.nullcontext():
                _write(search(finder, work, case.name, work.model, timed=False).as_json())
        signal.alarm(0)


def _too_long(*_: Any) -> None:
    raise _Hangs


def on_a_device(task: dict[str, Any]) -> None:
    """Do what ``task`` says with real memory, and write what came out."""
    spec = find(task["model"], task["device"], task["limit"])
    work = real.RealWork(spec)
    if task["do"] == "truth":
        gc.enable()
        with work.session():
            largest = real.largest(work, task["steps"])
            low, high = (share * largest for share in task["near"])
            near = [size for size in task["sizes"] if low <= size <= high]
            _write({"largest": largest, "lasts": {str(size): real.lasts(work, size, task["steps"]) for size in near}})
    else:
        finder = by_name(task["finder"])
        load(finder.module or "autobatch.probe.opening")
        found = None
        with work.session():
            if not finder.needs_readings:
                found = search(finder, work, spec.name, work.model, timed=True)
        if found is None:  # find holds the device itself; what a session brings in is there for it as for the others
            found = search(finder, work, spec.name, work.model, timed=True)
        _write(found.as_json())


def _write(document: dict[str, Any]) -> None:
    print(json.dumps(document), file=sys.__stdout__, flush=True)  # a finder may have put another in the place of sys.stdout


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    with silent():
        if task["do"] == "simulated":
            simulated(by_name(task["finder"]), task["cases"], task["readings"])
        else:
            on_a_device(task)
    os._exit(0)  # what libraries do at the end of a process would take longer than some searches
