"""``python -m benchmarks.peers``: the whole run, its tables and its comparison with the committed one."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.peers import compare, judge, publish, run
from benchmarks.peers.cases import DRAWN
from benchmarks.peers.finders import OURS, finders


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench --peers")
    parser.add_argument("--cases", type=int, default=DRAWN, help="drawn cases; a run with fewer is printed, not published")
    parser.add_argument("--models", type=int, default=None, help="real models; likewise")
    parser.add_argument("--finder", default="", help="only finders with this in their name; likewise")
    parser.add_argument("--cuda", action="store_true", help="the models on a card, added to the committed run")
    parser.add_argument("--again", metavar="NAME", help="only the formulas, by finders with this in their name, put into the committed run")
    parser.add_argument("--tables", action="store_true", help="no run: the tables of the committed one, again")
    parser.add_argument("--compare", nargs="?", const="", metavar="FILE", help="hold FILE, or a new run of ours, against the committed one")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side on formulas")
    parser.add_argument("--timed-jobs", type=int, default=1, help="processes side by side where they are timed")
    arguments = parser.parse_args()
    if arguments.compare is not None:
        return _compare(arguments)
    if arguments.tables:
        publish.publish(json.loads(publish.RESULTS.read_text()))
        return 0
    if arguments.again is not None:
        return _again(arguments.again, arguments.jobs)
    if arguments.cuda and not torch.cuda.is_available():
        parser.error("--cuda needs an NVIDIA card, and torch sees none. Leave it out for the formulas and the processor.")
    started = time.monotonic()
    document = _run(arguments)
    document["minutes"] = round((time.monotonic() - started) / 60, 1)
    if arguments.cuda:
        committed = json.loads(publish.RESULTS.read_text())
        about = {key: document[key] for key in ("date", "machine", "versions")}
        document = committed | {"cuda": document["cuda"], "cuda_run": about}
    print(publish.page(document))
    if (arguments.cases, arguments.models, arguments.finder) == (DRAWN, None, ""):
        publish.publish(document)
    return 0


def _run(arguments: argparse.Namespace) -> dict[str, object]:
    return judge.compact(
        run.everything(
            count=arguments.cases,
            only=arguments.finder,
            models=arguments.models,
            cuda=arguments.cuda,
            jobs=arguments.jobs,
            timed_jobs=arguments.timed_jobs,
        )
    )


def _again(name: str, jobs: int) -> int:
    """Search the formulas again with some finders; their answers depend on nothing else, so the rest of the committed run stands."""
    document = json.loads(publish.RESULTS.read_text())
    chosen = [finder for finder in finders() if name in finder.name]
    rows = judge.compact({"simulated": run.simulated(chosen, document["cases"], jobs)})["simulated"]
    anew = {(row["finder"], row["mode"]): row for row in rows}
    document["simulated"] = [anew.get((row["finder"], row["mode"]), row) for row in document["simulated"]]
    publish.publish(document)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    committed = json.loads(publish.RESULTS.read_text())
    if arguments.compare:
        document = json.loads(Path(arguments.compare).read_text())
    else:
        document = judge.compact(run.everything(chosen=OURS, models=arguments.models, jobs=arguments.jobs))
    lines = compare.compare(document, committed)
    print("\n".join(lines) or f"the same as the run of {committed['date']}: searches exactly, times within {compare.NOISE} ×")
    print(f"held at {datetime.date.today().isoformat()}", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
