"""Records what the zoo does on a real card, as ground truth for the simulated one.

    scripts/record_cuda [--only NAME] [--out FOLDER] [--quick]

Every run is a forked child of its own: it begins with nothing allocated, and whatever becomes of it is a row of the recording. This process
itself never touches the card, or its children could not.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from autobatch.core.units import GIB, MIB, format_bytes
from autobatch.devices.forget import forget
from autobatch.devices.nvml import Nvml
from autobatch.devices.oom import classify
from autobatch.simulate.allocator_settings import VARIABLES
from autobatch.simulate.apart import Died, TookTooLong, run_apart
from autobatch.workload.workload import build_workload
from benchmarks.recordings import Recording, Run, events_from_torch, write
from benchmarks.zoo import CARD_SCALE, ZOO
from benchmarks.zoo_step import train

GRAIN = 8 * MIB  # of the smallest cap
SMALL = 2 * GIB  # the cap for which the largest batch is sought
MOST = 2**17  # rows that are tried at most
SECONDS = 300.0  # that one child may take
SEARCH_SECONDS = 900.0
EVENTS = 1_000_000
RESULTS = Path(os.environ.get("AUTOBATCH_RESULTS", Path(__file__).parent / "results")) / "recordings"
NO_CARD = """record_cuda: {}
Nothing was recorded. Type nvidia-smi to see whether there is a card and a driver; then, with an interpreter that has a CUDA build of torch:
PYTHON=path/to/python scripts/record_cuda --quick"""


class Failed(Exception):
    """A child gave no result; the first word says how it ended."""


def apart(function: Callable[[], Any], seconds: float) -> Any:
    """Return what ``function`` returns, run in a child that has ``seconds``.

    Raises:
        Failed: it raised, died, or took too long.
    """
    try:
        return run_apart(function, seconds=seconds)
    except TookTooLong as error:
        raise Failed(f"timeout: {error}") from None
    except Died as error:
        raise Failed(f"died: {error}") from None
    except Exception as error:  # noqa: BLE001 whatever it is becomes a row
        raise Failed(f"error: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def card_facts() -> dict[str, Any]:
    """Return what the card and the software are, and the bytes that cuBLAS takes at its first products."""
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch.cuda.is_available() is false (torch {torch.__version__})")
    properties = torch.cuda.get_device_properties(0)
    uuid = str(getattr(properties, "uuid", ""))
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "total": torch.cuda.mem_get_info(0)[1],
        "uuid": uuid,
        "driver": Nvml().card(uuid).driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "python": platform.python_version(),
        "context_by": "driver" if Nvml().card(uuid).used is not None else "all in use on the card",
        "alloc_conf": next((os.environ[name] for name in VARIABLES if os.environ.get(name)), ""),
        "cublas_workspace_config": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "workspaces": _workspaces(),
    }


def _workspaces() -> dict[str, int]:
    """Return the bytes that stay allocated after the first products: in this thread, in the backward thread, and with a bias in bf16."""
    made: dict[str, int] = {}
    left, right = (torch.ones(64, 64, device="cuda", requires_grad=True) for _ in range(2))
    before = torch.cuda.memory_allocated()
    product = left @ right
    made["forward"] = torch.cuda.memory_allocated() - before - 64 * 64 * 4
    loss = product.sum()
    before = torch.cuda.memory_allocated()
    loss.backward()  # type: ignore[no-untyped-call]
    made["backward"] = torch.cuda.memory_allocated() - before - 2 * 64 * 64 * 4
    low = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    biased = torch.nn.functional.linear(low, low, low[0])
    made["bf16_with_bias"] = torch.cuda.memory_allocated() - before - biased.nbytes
    return made


def hold(cap: int, card: dict[str, Any]) -> None:
    """Hold the allocator to ``cap`` bytes, a multiple of 2 MiB; one more MiB holds no segment, and makes up for a fraction rounded down."""
    torch.cuda.set_per_process_memory_fraction((cap + MIB) / card["total"])


def run(name: str, batch_size: int, cap: int | None, card: dict[str, Any]) -> Run:
    """Return a run from its first request on; running out of memory is an outcome."""
    recipe = ZOO[name](CARD_SCALE)
    before = Nvml().card(card["uuid"]).used
    torch.cuda.init()  # type: ignore[no-untyped-call]
    torch.cuda.memory._record_memory_history("all", context=None, stacks="python", max_entries=EVENTS)
    if cap is not None:
        hold(cap, card)
    outcome, message, peaks = "fit", "", {}
    try:
        recipe.arguments["model"].cuda()
        peaks = train(build_workload(**recipe.arguments), batch_size, compiled=recipe.compiled)
    except Exception as error:  # noqa: BLE001 whatever it is becomes a row
        outcome, message = "oom" if classify(error) is not None else "error", _first_line(error)
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    whole = len(trace) < EVENTS
    return Run(
        batch_size=batch_size,
        cap=cap,
        outcome=outcome,
        message=message or ("" if whole else f"{EVENTS} events or more: no history"),
        peaks=peaks,
        retries=int(torch.cuda.memory_stats().get("num_alloc_retries", 0)),
        context=_context(before, card["uuid"]),
        events=events_from_torch(trace) if whole else (),
    )


def _context(before: int | None, uuid: str) -> int:
    """Return the bytes beside what is reserved: by the driver's count before and now, else all that is in use on the card."""
    after = Nvml().card(uuid).used
    if before is None or after is None:
        free, total = torch.cuda.mem_get_info(0)
        before, after = 0, total - free
    return after - before - torch.cuda.memory_reserved()


class Searcher:
    """Tries sizes and caps in one process, everything built again and all memory given back between them."""

    def __init__(self, name: str, card: dict[str, Any]) -> None:
        self.recipe, self.card = ZOO[name](CARD_SCALE), card

    def fits(self, batch_size: int, cap: int) -> bool:
        """Whether the steps of ``batch_size`` rows complete under ``cap`` bytes."""
        hold(cap, self.card)
        fitted = True
        try:
            model = copy.deepcopy(self.recipe.arguments["model"]).cuda()
            train(build_workload(**{**self.recipe.arguments, "model": model}), batch_size)
        except Exception as error:
            if classify(error) is None:
                raise
            forget(error)
            fitted = False
        model = None
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        return fitted

    def smallest_cap(self, batch_size: int, low: int, high: int) -> int:
        """Return the least multiple of 8 MiB in which ``batch_size`` rows fit, between ``low`` which may not do and ``high`` which does."""
        least, most = low // GRAIN, -(-high // GRAIN)
        while least + 1 < most:
            middle = (least + most) // 2
            least, most = (least, middle) if self.fits(batch_size, middle * GRAIN) else (middle, most)
        return most * GRAIN

    def largest(self, cap: int) -> int:
        """Return the largest batch that fits in ``cap`` bytes, 0 for none."""
        good, bad = 0, 1
        while bad <= MOST and self.fits(bad, cap):
            good, bad = bad, 2 * bad
        while good + 1 < bad <= MOST:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if self.fits(middle, cap) else (good, middle)
        return good


def record(name: str, card: dict[str, Any], quick: bool) -> Recording:
    """Return the recording of one workload."""
    recipe = ZOO[name](CARD_SCALE)
    sizes = recipe.batch_sizes[:2] if quick else recipe.batch_sizes
    runs = [_row(name, size, None, card) for size in sizes]
    found: dict[str, Any] = {}
    middle = runs[1]
    if not quick and not recipe.compiled and middle.outcome == "fit":
        try:
            found = apart(lambda: _search(name, middle, card), SEARCH_SECONDS)
        except Failed as error:
            found = {"message": f"search: {error}"}
    if "smallest_cap" in found:
        runs += _at_the_wall(name, found["smallest_cap"], card)
    facts = {key: value for key, value in card.items() if key != "uuid"}
    return Recording(workload=name, scale=CARD_SCALE, card=facts, runs=tuple(runs), **found)


def _at_the_wall(name: str, found: dict[str, int], card: dict[str, Any]) -> list[Run]:
    """Run at the smallest cap and 8 MiB below it, each from nothing, and move the cap where these say so."""
    rows: dict[int, Run] = {}

    def fits(cap: int) -> bool:
        if cap not in rows:
            rows[cap] = _row(name, found["batch_size"], cap, card)
        return rows[cap].outcome == "fit"

    cap = found["cap"]
    for _ in range(8):
        if not fits(cap):
            cap += GRAIN
        elif fits(cap - GRAIN):
            cap -= GRAIN
    found["cap"] = cap
    return [rows[at] for at in (cap - GRAIN, cap) if at in rows]


def _row(name: str, batch_size: int, cap: int | None, card: dict[str, Any]) -> Run:
    try:
        row: Run = apart(lambda: run(name, batch_size, cap, card), SECONDS)
    except Failed as error:
        outcome, _, message = str(error).partition(": ")
        row = Run(batch_size=batch_size, cap=cap, outcome=outcome, message=message)
    return row


def _search(name: str, middle: Run, card: dict[str, Any]) -> dict[str, Any]:
    searcher = Searcher(name, card)
    reserved = max(peak["reserved"] for peak in middle.peaks.values())
    cap = searcher.smallest_cap(middle.batch_size, middle.peak_allocated // 2, reserved)
    return {
        "smallest_cap": {"batch_size": middle.batch_size, "cap": cap},
        "largest": {"cap": SMALL, "batch_size": searcher.largest(SMALL)},
    }


def main(arguments: list[str] | None = None) -> int:
    """Record; 0 when done, 2 where no name fits, 3 where there is no card."""
    parser = argparse.ArgumentParser(prog="record_cuda", description="Record what the zoo does on a real card.")
    parser.add_argument("--only", metavar="NAME", default="", help="those whose name has NAME in it")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=RESULTS, help="by default benchmarks/results/recordings")
    parser.add_argument("--quick", action="store_true", help="two batch sizes each, no searches")
    options = parser.parse_args(arguments)
    names = [name for name in ZOO if options.only in name]
    if not names:
        print(f"record_cuda: nothing in the zoo has {options.only!r} in its name. There are: {', '.join(ZOO)}", file=sys.stderr)
        return 2
    try:
        card = apart(card_facts, SECONDS)
    except Failed as error:
        print(NO_CARD.format(str(error).partition("RuntimeError: ")[2] or error), file=sys.stderr)
        return 3
    folder = options.out / card["name"].lower().replace(" ", "-")
    for name in names:
        started = time.perf_counter()
        recording = record(name, card, options.quick)
        path = folder / f"{name}.json.gz"
        write(recording, path)
        highest = format_bytes(max(row.peak_allocated for row in recording.runs))
        outcomes = " ".join(row.outcome for row in recording.runs)
        size = path.stat().st_size // 1024
        print(f"{name}: {outcomes}, {highest} at most, {size} KiB, {time.perf_counter() - started:.0f} s {recording.message}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
