"""Holds a run against the committed one: what is deterministic exactly, times by their ratio within each run."""

from __future__ import annotations

from typing import Any

# Ratios of processor times between two runs on one machine scatter by this factor when it does other work as well.
NOISE = 1.5


def compare(run: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Return what differs: a line for each simulated search that is not the same, and for each time ratio beyond the noise."""
    return [*_searches(run, committed), *_times(run, committed)]


def _searches(run: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    if run.get("cases") != committed.get("cases"):
        return [f"{run.get('cases')} drawn cases against {committed.get('cases')}: not the same work"]
    before = {(row["finder"], row["mode"]): row["searches"] for row in committed["simulated"]}
    lines = []
    for row in run["simulated"]:
        key = (row["finder"], row["mode"])
        if row["searches"] == before.get(key) or (row["why"] and not row["searches"]):
            continue
        off = [number for number, (now, then) in enumerate(zip(row["searches"], before.get(key, []), strict=False)) if now != then]
        first = f", the first at case {off[0]}: {row['searches'][off[0]]} against {before[key][off[0]]}" if off else ""
        lines.append(f"{key[0]}, {key[1]}: {len(off)} of {len(row['searches'])} searches differ{first}")
    return lines


def _times(run: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    lines, before = [], _ratios(committed)
    for (finder, model), ratio in _ratios(run).items():
        then = before.get((finder, model))
        if then and not 1 / NOISE <= ratio / then <= NOISE:
            lines.append(
                f"{finder} on {model}: {ratio:.2f} × autobatch's processor time against {then:.2f} ×, beyond the noise of {NOISE} ×"
            )
    return lines


def _ratios(document: dict[str, Any]) -> dict[tuple[str, str], float]:
    found = {(row["finder"], row["model"]): (row["search"] or {}).get("processor") for row in document["real"]}
    pairs = {key: (seconds, found.get(("autobatch", key[1]))) for key, seconds in found.items()}
    return {key: mine / own for key, (mine, own) in pairs.items() if mine and own}
