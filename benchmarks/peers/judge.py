"""One measure for all: what of a run's searches was right, what lasted, and what they cost."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.cases import Case, cases

# An answer is right from this share of the true maximum on.
CLOSE = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table. Shares are of all searches, ``None`` where there were none.

    Attributes:
        finder: which.
        searches: how many there were.
        right: share of answers within 1 % of the true maximum and not above it.
        reached: mean of the answers that last as a share of the true maximum, ``None`` where that was not looked at.
        special: right answers to special cases and how many of those there are, in words.
        fails: share of searches whose answer does not last in training.
        untested: share whose answer was not itself run by the finder.
        silent: share that broke or gave no answer.
        trials, out_of_memory: mean of each.
        rows: mean of the rows run as a multiple of the answer.
        wall, processor: mean ratios of the time to autobatch's on the same work; ``None`` where nothing was timed.
        left: most bytes left behind, ``None`` where that was not looked at.
        changed: what was changed, in words.
        why: why it did not run, or what it said where it broke.
    """

    finder: str
    searches: int
    right: float | None
    reached: float | None
    special: str
    fails: float | None
    untested: float | None
    silent: float | None
    trials: float | None
    out_of_memory: float | None
    rows: float | None
    wall: float | None
    processor: float | None
    left: int | None
    changed: str
    why: str


@functools.cache
def _first_limit(case: Case) -> int:
    return case.truth()[0]


def verdict(case: Case, answer: int | None) -> tuple[bool, bool]:
    """Return whether ``answer`` is right, and whether it lasts in training; saying that nothing fits is an answer that lasts."""
    first = _first_limit(case)
    if answer is None:
        return False, True
    if answer == 0:
        return first == 0, True
    lasts = case.lasts(answer)
    return lasts and first > 0 and answer >= CLOSE * first and answer <= (case.dataset or answer), lasts


def compact(document: dict[str, Any]) -> dict[str, Any]:
    """Return a run with each search of a formula as a list: answer, trials, out-of-memory errors, rows, whether the answer was run."""
    for row in document.get("simulated", []):
        found = row["searches"]
        row["changed"] = None if not found or found[0]["changed"] is None else sorted({what for one in found for what in one["changed"]})
        row["errors"] = {one["work"]: one["error"] for one in found if one["error"]}
        row["searches"] = [[one["answer"], one["trials"], one["out_of_memory"], one["rows"], one["ran"]] for one in found]
    return document


def simulated_rows(document: dict[str, Any], mode: str) -> list[Row]:
    """Return the lines of the finders that searched all cases in ``mode``, and of those that could not."""
    every = cases(document["cases"])
    rows = [row for row in document["simulated"] if row["mode"] == mode]
    return [_simulated_row(row, every) for row in rows if not row["searches"] or len(row["searches"]) == len(every)]


def same_with_readings(document: dict[str, Any]) -> dict[str, bool]:
    """Return whether the finders that read nothing did the same with readings, on the special cases."""
    full = {row["finder"]: row["searches"] for row in document["simulated"] if row["mode"] == "by errors"}
    few = {row["finder"]: row["searches"] for row in document["simulated"] if row["mode"] == "with readings"}
    return {name: full[name][-len(found) :] == found for name, found in few.items() if found and len(found) < len(full.get(name, []))}


def _simulated_row(row: dict[str, Any], every: Sequence[Case]) -> Row:
    judged = [(case, one, *verdict(case, one[0])) for case, one in zip(every, row["searches"], strict=False)]
    special = [right for case, _, right, _ in judged if case.kind != "drawn"]
    first_error = next(iter(row["errors"].values()), "")
    return Row(
        finder=row["finder"],
        searches=len(judged),
        right=_share(right for _, _, right, _ in judged),
        reached=None,
        special=f"{sum(special)} of {len(special)}" if special else "–",
        fails=_share(not lasts for *_, lasts in judged),
        untested=_share(bool(one[0]) and not one[4] for _, one, *_ in judged),
        silent=_share(one[0] is None for _, one, *_ in judged),
        trials=_mean(one[1] for _, one, *_ in judged),
        out_of_memory=_mean(one[2] for _, one, *_ in judged),
        rows=_mean(one[3] / one[0] for _, one, *_ in judged if one[0]),
        wall=None,
        processor=None,
        left=None,
        changed=_words(row["changed"]),
        why=row["why"] or (f"{len(row['errors'])} searches broke, the first with {first_error}" if first_error else ""),
    )


def real_rows(document: dict[str, Any], key: str = "real") -> list[Row]:
    """Return the lines of all finders on a device."""
    names = list(dict.fromkeys(row["finder"] for row in document[key]))
    own = {(row["model"], row["limit"]): row["search"] for row in document[key] if row["finder"] == "autobatch"}
    return [_real_row(name, [row for row in document[key] if row["finder"] == name], own) for name in names]


def _real_row(name: str, rows: list[dict[str, Any]], own: dict[Any, Any]) -> Row:
    found = [(row, row["search"]) for row in rows if row["search"]]
    answered = [(row, one) for row, one in found if one["answer"]]

    def ratio(what: str) -> float | None:
        pairs = [(one[what], (own.get((row["model"], row["limit"])) or {}).get(what)) for row, one in answered]
        return _mean(mine / theirs for mine, theirs in pairs if theirs)

    changed = [one["changed"] for _, one in found]
    return Row(
        finder=name,
        searches=len(rows),
        right=_share(bool(row.get("lasts")) and one["answer"] >= CLOSE * row["largest"] for row, one in found),
        reached=_mean(one["answer"] / row["largest"] for row, one in answered if row.get("lasts")),
        special="",
        fails=_share(bool(one["answer"]) and not row.get("lasts") for row, one in found),
        untested=_share(bool(one["answer"]) and not one["ran"] for _, one in found),
        silent=_share(one["answer"] is None for _, one in found),
        trials=_mean(one["trials"] for _, one in found),
        out_of_memory=_mean(one["out_of_memory"] for _, one in found),
        rows=_mean(one["rows"] / one["answer"] for _, one in answered),
        wall=ratio("seconds"),
        processor=ratio("processor"),
        left=max((one["left"] for _, one in found), default=None),
        changed=_words(None if not changed or changed[0] is None else sorted({what for one in changed for what in one})),
        why=next((text for row in rows for text in (row["why"], (row["search"] or {}).get("error", "")) if text), ""),
    )


def _words(changed: list[str] | None) -> str:
    """Return what was changed in words; a finder that was given a function has no hold on what that changes."""
    return "the function's" if changed is None else ", ".join(changed) or "nothing"


def _share(values: Any) -> float | None:
    kept = list(values)
    return sum(kept) / len(kept) if kept else None


def _mean(values: Any) -> float | None:
    kept = list(values)
    return statistics.fmean(kept) if kept else None
