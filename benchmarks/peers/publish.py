"""Writes what a run found: the tables of docs/comparison.md, and README's between its markers. Neither is edited by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from autobatch.core.units import MIB
from benchmarks.peers.cases import STEPS
from benchmarks.peers.judge import Row, real_rows, same_with_readings, simulated_rows
from benchmarks.peers.run import LASTS, MODES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
FEATURES = Path(__file__).parent / "features.json"
PAGE, README = ROOT / "docs" / "comparison.md", ROOT / "README.md"
BEGIN, END = "<!-- peers: made by scripts/bench --peers -->", "<!-- peers: end -->"

_SIMULATED = ("finder", "right", "special", "fails", "untested", "no answer", "trials", "OOM", "rows", "changed")
_REAL = ("finder", "right", "reached", "fails", "untested", "no answer", "trials", "OOM", "rows", "wall", "processor", "left", "changed")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}".replace(".0%", "%").replace("%", " %")


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:.1f}{sign}"


def _cells(row: Row, columns: tuple[str, ...]) -> list[str]:
    every = {
        "finder": row.finder,
        "right": _percent(row.right),
        "reached": _percent(row.reached),
        "special": row.special,
        "fails": _percent(row.fails),
        "untested": _percent(row.untested),
        "no answer": _percent(row.silent),
        "trials": _number(row.trials),
        "OOM": _number(row.out_of_memory),
        "rows": _number(row.rows, "×"),
        "wall": _number(row.wall, "×"),
        "processor": _number(row.processor, "×"),
        "left": "–" if row.left is None else f"{row.left / MIB:.1f} MiB",
        "changed": row.changed,
    }
    return [every[column] for column in columns]


def table(rows: list[Row], columns: tuple[str, ...]) -> list[str]:
    """Return ``rows`` as lines of Markdown; a finder that did not run says why across them."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        ran = [row.finder, f"did not run: {row.why}"] + [""] * (len(columns) - 2)
        lines.append("| " + " | ".join(_cells(row, columns) if row.searches and row.right is not None else ran) + " |")
    return lines


def _broken(rows: list[Row]) -> list[str]:
    return [f"- {row.finder}: {row.why}" for row in rows if row.why and row.searches]


def of_run(document: dict[str, Any]) -> str:
    """Return when, with what and on what a run was made."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return f"{document['date']}, {document['machine']}; {versions}."


def page(document: dict[str, Any]) -> str:
    """Return docs/comparison.md."""
    same = same_with_readings(document)
    other = [name for name, equal in same.items() if not equal]
    by_errors, with_readings = (simulated_rows(document, mode) for mode in MODES)
    real = real_rows(document)
    lines = ["# Every finder on the same work", "", f"Made by `scripts/bench --peers`: {of_run(document)}", "", *_HOW, ""]
    lines += ["## On a simulated card, by out-of-memory errors alone", "", *table(by_errors, _SIMULATED), "", *_broken(by_errors), ""]
    lines += ["## On a simulated card, with its memory to read", "", *table(with_readings, _SIMULATED), "", *_broken(with_readings), ""]
    exceptions = f"all but {', '.join(other)}" if other else "all of them"
    lines += [f"{len(same)} finders look at no memory. On the special cases they did the same with readings as without, {exceptions}.", ""]
    before, after = document["load"]
    timed = f"Timed {document['timed_jobs']} side by side; load average {before} when this began and {after} when it ended."
    lines += ["## With real memory under a real limit", "", timed, "", *table(real, _REAL), "", *_broken(real), "", *_largest(document), ""]
    lines += ["## On a card", ""]
    if "cuda" in document:
        lines += [of_run(document["cuda_run"]), "", *table(real_rows(document, "cuda"), _REAL), ""]
    else:
        lines += ["Not run yet: no card has been available. `scripts/bench --cuda --peers` adds six models at three budgets.", ""]
    lines += ["## How each was called", "", "| finder | options | given |", "|---|---|---|"]
    lines += [f"| {f['name']} | {f['options'] or 'defaults'} | a {f['given']} |" for f in document["finders"]]
    return "\n".join([*lines, "", *features()]).rstrip() + "\n"


def _largest(document: dict[str, Any]) -> list[str]:
    """Return what every finder answered on every model."""
    models = list(dict.fromkeys(row["model"] for row in document["real"]))
    names = list(dict.fromkeys(row["finder"] for row in document["real"]))
    found = {(row["finder"], row["model"]): (row["search"] or {}).get("answer") for row in document["real"]}
    truth = {row["model"]: row["largest"] for row in document["real"]}
    lines = ["The answers:", "", "| | " + " | ".join(models) + " |", "|---|" + "---|" * len(models)]
    lines.append("| **largest that lasts** | " + " | ".join(f"**{truth[model]}**" for model in models) + " |")
    return [*lines, *(f"| {name} | " + " | ".join(str(found.get((name, model)) or "–") for model in models) + " |" for name in names)]


def features() -> list[str]:
    """Return the feature table and where each tick comes from."""
    known = json.loads(FEATURES.read_text())
    names = ["autobatch", *known["peers"]]
    lines = [
        "## Features",
        "",
        "A tick is backed by a test of ours or a line of the peer's source; no tick means not seen, not proven absent.",
        "",
    ]
    lines += ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    sources: list[str] = []
    for feature in known["features"]:
        cells = []
        for name in names:
            source = feature["ticks"].get(name)
            if source and source not in sources:
                sources.append(source)
            cells.append(f"✓ [{sources.index(source) + 1}]" if source else "")
        lines.append(f"| {feature['name']} | " + " | ".join(cells) + " |")
    return [*lines, "", *(f"{number}. {_linked(source)}" for number, source in enumerate(sources, 1))]


def _linked(source: str) -> str:
    path = source.partition("::")[0]
    return f"[`{source}`](../{path})" if path.startswith("tests/") else f"`{source}`"


def readme_table(document: dict[str, Any]) -> str:
    """Return what stands between README's markers."""
    simulated = {row.finder: row for mode in MODES for row in simulated_rows(document, mode)}
    real = {row.finder: row for row in real_rows(document)}
    shown = [f["name"] for f in document["finders"] if f["name"] in simulated and "as shipped" not in f["name"]]
    columns = ("finder", "right, simulated", "special cases", "trials", "OOM", "rows", "right, real", "time, real", "state changed")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name in shown:
        row, there = simulated[name], real.get(name)
        cells = [name, _percent(row.right), row.special, _number(row.trials), _number(row.out_of_memory), _number(row.rows, "×")]
        cells += ["–", "–"] if there is None else [_percent(there.right), _number(there.wall, "×")]
        changed = row.changed if row.searches or there is None else there.changed
        lines.append("| " + " | ".join([*cells, changed]) + " |")
    how = (
        "Margins set to zero and limits lifted wherever a finder has them. *Right*: within 1 % of the true maximum, not above it. *Rows*:\n"
        "all rows run as a multiple of the answer, on the simulated cases; finders that read memory were given it. *Real*: six models\n"
        "within 64 to 128 MiB of a processor's memory; *time* as a ratio to autobatch's, whose trials each have a fresh worker"
        f"{_in_this_process(real)}.\nEvery row, and the finders as shipped: [docs/comparison.md](docs/comparison.md)."
    )
    return "\n".join([BEGIN, f"{of_run(document)}", "", *lines, "", how, END])


def _in_this_process(real: dict[str, Row]) -> str:
    row = real.get("autobatch, in this process")
    return "" if row is None else f"\n(`isolate=False`: {_percent(row.right)} right in {_number(row.wall, '×')} the time)"


def publish(document: dict[str, Any]) -> None:
    """Write JSON, page and README."""
    searches = json.dumps(document, indent=1, ensure_ascii=False)
    RESULTS.write_text(_one_line_each(searches) + "\n")
    PAGE.write_text(page(document))
    text = README.read_text()
    before, found, rest = text.partition(BEGIN)
    if found:
        README.write_text(before + readme_table(document) + rest.partition(END)[2])


def _one_line_each(text: str) -> str:
    """Return indented JSON text with each innermost list on a line of its own."""
    return re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda found: "[" + re.sub(r"\n\s+", " ", found[1]) + "]", text)


_HOW = (
    "Installed peers, unmodified, each in a process of its own and called through its own public interface, on the same work with the",
    "same definition of a step: forward, backward, optimizer step, three steps a trial where the finder leaves that to the caller. Finders",
    "with a margin or a limit of their own come twice: as shipped, and with both out of the way, so that all answer the same question.",
    "",
    "- **right**: the answer is within 1 % of the true maximum and not above it; where nothing fits, that it says so. The truth is an",
    "  exhaustive scan of the formula, and with real memory a search by forked processes that ends with",
    f"  {LASTS} steps. Where a band of sizes fails below larger ones that fit, any size that lasts and reaches up to the band counts.",
    f"- **fails**: the answer does not last {STEPS} training steps ({LASTS} with real memory). **untested**: the finder never ran it.",
    "  **no answer**: it raised something else, or hung.",
    "- **trials**, **OOM**: mean attempts, and those that ran out of memory. **rows**: all rows run, as a multiple of the answer.",
    "- **wall**, **processor**: time as a ratio to autobatch's in the same run; on a machine that does other work too, processor time is",
    "  the steadier one. **left**: the most memory that stayed with the process.",
    "- **changed**: what of weights, buffers, gradients, modes and random state was different afterwards; where a finder is given a",
    "  function and no model, that is the function's doing.",
    "",
    "The simulated card takes what a formula says (`benchmarks/peers/cases.py`): parameters and gradients, optimizer state from the end of",
    "the first step on, bytes a row, the optimizer's own peak. It runs out of memory as CUDA does. Its memory is read through autobatch's",
    "device protocol, or through `torch.cuda`'s statistics, patched in around the peer (`benchmarks/peers/card.py`); no peer is changed.",
    "With real memory, every trial of every finder is held to one limit on address space, and any error about memory reaches the finder",
    "as CUDA's, which all of them know; where a finder runs the passes itself, it meets the processor's own error. autovram starts a",
    "process for every trial and is therefore run on one model only; on formulas it is given a runner that starts none. batch-finder would",
    "sleep between its attempts and is told not to; its own process for an attempt cannot be started with `spawn`, so it is not asked for.",
    "",
    "**reached** is the mean of the answers that last as a share of the largest size that a fresh process can train with. A process that",
    "has run trials keeps some memory of them (oneDNN's kernels): within 64 to 128 MiB that costs finders that run many trials one after",
    "another in a process some percent of the answer; autobatch gives each trial a fresh worker. Room for small blocks is laid up before",
    "every search, ours and theirs, so that a size takes the same bytes in every process.",
    "",
    "Above 8,192 rows Lightning's binsearch begins again at 8,192 after every failure, because it does not pass `max_val` on there",
    "(lightning 2.6.6: `lightning/pytorch/tuner/batch_size_scaling.py:303`).",
)
