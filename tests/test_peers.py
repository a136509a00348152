"""The bench of all finders: its truth, its judgement, the committed figures, and that its pages are made of them. No peer is needed."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.peers import card, publish
from benchmarks.peers.cases import Case, cases, drawn, special
from benchmarks.peers.child import search
from benchmarks.peers.compare import compare
from benchmarks.peers.finders import OURS, Finder, plain
from benchmarks.peers.judge import real_rows, simulated_rows, verdict
from benchmarks.peers.simulated import SimulatedWork

ROOT = Path(__file__).parents[1]
COMMITTED = json.loads(publish.RESULTS.read_text())
EVERY = cases(COMMITTED["cases"])
# The special cases and every twentieth of the drawn ones are searched again here; scripts/bench --compare searches all of them.
AGAIN = [number for number, case in enumerate(EVERY) if case.kind != "drawn" or number % 20 == 0]
SEARCHED = [
    (finder, mode)
    for finder in OURS
    if "simulated" in finder.on
    for mode in (("with readings",) if finder.needs_readings else ("by errors", "with readings"))
]


@pytest.fixture(autouse=True)
def _little_garbage() -> Iterator[None]:
    """Collecting garbage after every trial that ran out of memory takes as long as there are objects in the process."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("case", special(), ids=lambda case: case.name)
def test_the_truth_is_the_last_size_that_lasts(case: Case) -> None:
    first, largest = case.truth()
    assert first == 0 or case.lasts(first)
    assert largest == 0 or case.lasts(largest)
    assert case.dataset == largest or not case.lasts(largest + 1)
    assert case.band or first == largest


def test_drawn_cases_are_those_of_the_search_cost_and_all_fit_something() -> None:
    truths = [case.truth()[0] for case in drawn(50)]
    assert min(truths) >= 1
    assert max(truths) > 8192


def test_a_step_that_grows_later_does_not_last_although_it_ran() -> None:
    case = next(case for case in special() if case.kind == "grows in the third step")
    ran = replace(case, growth=0).truth()[0]
    assert case.lasts(ran, steps=2)
    assert verdict(case, ran) == (False, False)


def test_an_answer_is_judged_by_its_distance_from_the_truth_and_by_training() -> None:
    case = next(case for case in special() if case.name == "power-1024")
    assert [verdict(case, answer) for answer in (1024, 1014, 1013, 1025)] == [(True, True), (True, True), (False, True), (False, False)]
    assert verdict(case, None) == (False, True)
    assert verdict(case, 0) == (False, True)
    nothing = next(case for case in special() if case.kind == "nothing fits")
    assert [verdict(nothing, answer) for answer in (0, 1)] == [(True, True), (False, False)]


@given(largest=st.integers(0, 5000), limit=st.integers(1, 5000))
def test_the_reference_ends_within_one_percent(largest: int, limit: int) -> None:
    answer = plain(lambda size: size <= largest, limit)
    assert answer <= min(largest, limit)
    assert answer >= 0.99 * min(largest, limit)


@pytest.mark.parametrize(("finder", "mode"), SEARCHED, ids=lambda one: getattr(one, "name", one))
def test_the_committed_searches_come_out_again(finder: Finder, mode: str) -> None:
    (then,) = [row["searches"] for row in COMMITTED["simulated"] if (row["finder"], row["mode"]) == (finder.name, mode)]
    for number in AGAIN if len(then) == len(EVERY) else range(len(EVERY) - len(then), len(EVERY)):
        with card.inserted(EVERY[number]) as inserted:
            work = SimulatedWork(inserted, readable=mode == "with readings")
            now = search(finder, work, EVERY[number].name, work.model, timed=False)
        assert not now.error
        assert not now.changed
        assert [now.answer, now.trials, now.out_of_memory, now.rows, now.ran] == then[number - len(EVERY)], EVERY[number].name


def test_every_answer_of_ours_is_right_and_changes_nothing() -> None:
    rows = {(row.finder, mode): row for mode in ("by errors", "with readings") for row in simulated_rows(COMMITTED, mode)}
    for name, mode in (("autobatch", "with readings"), ("autobatch, foreseeing", "with readings"), ("autobatch.search", "by errors")):
        row = rows[name, mode]
        assert (row.right, row.fails, row.untested, row.silent) == (1.0, 0.0, 0.0, 0.0)
    assert rows["autobatch", "with readings"].changed == "nothing"
    searches = {row["finder"]: row["searches"] for row in COMMITTED["simulated"] if row["mode"] == "by errors"}
    assert all(ours[1] <= plains[1] for ours, plains in zip(searches["autobatch.search"], searches["plain reference"], strict=True))


def test_what_is_promised_beside_others_holds_in_the_committed_run() -> None:
    by_errors = {row.finder: row for row in simulated_rows(COMMITTED, "by errors")}
    ours = next(row for row in simulated_rows(COMMITTED, "with readings") if row.finder == "autobatch")
    assert ours.rows is not None
    assert ours.rows <= 0.35 * (by_errors["plain reference"].rows or 0)
    peers = [row for name, row in by_errors.items() if not name.startswith(("autobatch", "plain")) and row.right is not None]
    assert len(peers) >= 15
    assert max(row.right or 0 for row in peers) < 1
    assert all(3 * ours.rows <= row.rows for row in peers if row.right and row.right > 0.98 and row.rows)
    there = {row.finder: row for row in real_rows(COMMITTED)}
    assert (there["autobatch"].right, there["autobatch"].fails, there["autobatch"].changed) == (1.0, 0.0, "nothing")
    others = [row for name, row in there.items() if not name.startswith(("autobatch", "plain"))]
    assert all(row.wall is not None and row.wall >= 2 for row in others if row.right == 1)


def test_a_search_that_differs_is_told_and_so_is_a_time_beyond_the_noise() -> None:
    assert compare(COMMITTED, COMMITTED) == []
    run = json.loads(json.dumps(COMMITTED))
    row = next(row for row in run["simulated"] if row["finder"] == "plain reference" and row["mode"] == "by errors")
    row["searches"][2][1] += 1
    timed = next(row for row in run["real"] if row["finder"] == "plain reference" and row["search"])
    timed["search"]["processor"] *= 3
    lines = compare(run, COMMITTED)
    assert lines[0].startswith("plain reference, by errors: 1 of 316 searches differ, the first at case 2")
    assert re.search(r"plain reference on \w+: .* beyond the noise", lines[1])
    assert compare({**run, "cases": 5}, COMMITTED)[0] == "5 drawn cases against 300: not the same work"


def test_the_pages_are_made_of_the_committed_run() -> None:
    assert publish.PAGE.read_text() == publish.page(COMMITTED)
    assert publish.readme_table(COMMITTED) in publish.README.read_text()


def test_every_tick_of_ours_names_a_test_that_is_there() -> None:
    known = json.loads(publish.FEATURES.read_text())
    for feature in known["features"]:
        assert set(feature["ticks"]) <= {"autobatch", *known["peers"]}
        for name, source in feature["ticks"].items():
            if name == "autobatch":
                path, _, test = source.partition("::")
                assert f"def {test}(" in (ROOT / path).read_text(), source
            else:
                assert re.fullmatch(r"[\w-]+ [\d.]+: [\w/]+\.py:\d+", source), source
