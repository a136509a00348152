"""The search: exact sequences in plain cases, and its guarantees against an adversary."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.core.records import SearchSpace
from autobatch.core.search import Advisor, Ending, Search


class Hints:
    """An advisor that says whatever it was given, over and over; it never confirms anything."""

    def __init__(self, hints: list[int | None], limit: int | None = None, start: int | None = None) -> None:
        self._hints, self._limit, self._asked, self._start = hints, limit, 0, start

    def start(self, last: int) -> int | None:
        return self._start

    def suggest(self, best: int, wall: int | None) -> int | None:
        self._asked += 1
        return self._hints[self._asked % len(self._hints)] if self._hints else None

    def confirmed_limit(self, best: int) -> int | None:
        return self._limit


class Oracle:
    """An advisor that knows the answer."""

    def __init__(self, largest: int) -> None:
        self._largest = largest

    def start(self, last: int) -> int | None:
        return None

    def suggest(self, best: int, wall: int | None) -> int | None:
        return self._largest if best < self._largest else self._largest + 1

    def confirmed_limit(self, best: int) -> int | None:
        return self._largest if best == self._largest else None


def run(largest: int, advisor: Advisor | None = None, **space: float) -> tuple[Search, list[int]]:
    """Return the search and the sizes it asked for when everything up to ``largest`` fits."""
    search, asked = Search(SearchSpace(**{"tolerance": 0.0, "max": 2**20, **space}), advisor), []  # type: ignore[arg-type]
    while (size := search.ask()) is not None:
        assert search.ask() == size
        asked.append(size)
        search.tell(size, size <= largest)
    return search, asked


@pytest.mark.parametrize(
    ("largest", "space", "sequence", "ending"),
    [
        (1, {}, [1, 2], Ending.PROBED_WALL),
        (0, {}, [1], Ending.NOTHING_FITS),
        (8, {}, [1, 2, 4, 8, 16, 12, 10, 9], Ending.PROBED_WALL),
        (11, {}, [1, 2, 4, 8, 16, 12, 10, 11], Ending.PROBED_WALL),
        (15, {}, [1, 2, 4, 8, 16, 12, 14, 15], Ending.PROBED_WALL),
        (100, {}, [1, 2, 4, 8, 16, 32, 64, 128, 96, 112, 104, 100, 102, 101], Ending.PROBED_WALL),
        (100, {"tolerance": 0.05}, [1, 2, 4, 8, 16, 32, 64, 128, 96, 112, 104, 100], Ending.PROBED_WALL),
        (100, {"tolerance": 0.2}, [1, 2, 4, 8, 16, 32, 64, 128, 96, 112], Ending.PROBED_WALL),
        (100, {"max": 100}, [1, 2, 4, 8, 16, 32, 64, 100], Ending.LIMIT),
        (500, {"max": 100}, [1, 2, 4, 8, 16, 32, 64, 100], Ending.LIMIT),
        (100, {"min": 70}, [70, 140, 105, 87, 96, 100, 102, 101], Ending.PROBED_WALL),
        (100, {"min": 101}, [101], Ending.NOTHING_FITS),
        (100, {"multiple_of": 16}, [16, 32, 64, 128, 96, 112], Ending.PROBED_WALL),
        (100, {"multiple_of": 16, "max": 90}, [16, 32, 64, 80], Ending.LIMIT),
        (7, {"min": 3, "max": 9, "multiple_of": 3}, [3, 6, 9], Ending.PROBED_WALL),
        (1, {"max": 1}, [1], Ending.LIMIT),
    ],
)
def test_plain_sequences(largest: int, space: dict[str, float], sequence: list[int], ending: Ending) -> None:
    search, asked = run(largest, **space)
    assert (asked, search.ending) == (sequence, ending)
    if ending is not Ending.NOTHING_FITS:
        assert search.exact is ("tolerance" not in space)


def test_good_advice_takes_three_probes() -> None:
    assert run(12345, Oracle(12345))[1] == [1, 12345, 12346]
    search, asked = run(12345, Oracle(12345), tolerance=0.01)
    assert (asked, search.ending, search.predicted_wall) == ([1, 12345], Ending.PREDICTED_WALL, 12346)


def test_a_hint_that_earned_nothing_is_followed_by_a_plain_probe() -> None:
    # One more than the best each time: neither doubles nor halves.
    assert run(20, Hints([0]))[1] == [1, 2, 3, 6, 7, 14, 15, 30, 16, 23, 17, 20, 21]
    # Far too high each time: an early wall, then bisection in between.
    assert run(5, Hints([2**20]))[1][:5] == [1, 2**20, 2**19, 2**19 - 1, 2**18]


def test_a_search_that_expects_something_begins_there_and_from_the_smallest_size_where_that_does_not_fit() -> None:
    assert run(100, Hints([None], start=60))[1] == [60, 120, 90, 105, 97, 101, 99, 100]
    assert run(100, Hints([None], start=600))[1][:4] == [600, 1, 300, 150]
    assert run(100, Hints([None], start=0), min=16, multiple_of=8, tolerance=0.1)[1][:2] == [16, 32]
    assert run(100, Hints([None], start=600), max=90)[1] == [90]


def test_a_predicted_wall_counts_only_within_a_tolerance() -> None:
    assert run(64, Hints([], limit=64), tolerance=0.01)[0].ending is Ending.PREDICTED_WALL
    assert run(64, Hints([], limit=64), tolerance=0.0)[0].ending is Ending.PROBED_WALL


def test_a_rejected_answer_becomes_the_wall_and_the_search_goes_on_below() -> None:
    search, _ = run(100)
    search.reject(100)
    assert (search.best, search.wall, search.ending) == (96, 100, None)
    asked = []
    while (size := search.ask()) is not None:
        asked.append(size)
        search.tell(size, size <= 97)
    assert (asked, search.best, search.ending) == ([98, 97], 97, Ending.PROBED_WALL)
    only = Search(SearchSpace(max=1))
    only.tell(only.ask() or 0, True)
    only.reject(1)
    assert (only.ask(), only.ending) == (None, Ending.NOTHING_FITS)


def test_an_answer_that_barely_failed_is_tried_again_just_below() -> None:
    def goes_on(largest: int) -> list[int]:
        search, asked = run(1000, tolerance=0.01, max=1000)
        assert asked[-2:] == [512, 1000]
        search.reject(1000, barely=True)
        asked = []
        while (size := search.ask()) is not None:
            asked.append(size)
            search.tell(size, size <= largest)
        return asked

    assert goes_on(998) == [995]
    assert goes_on(994)[0] == 995
    assert goes_on(994)[1] == (512 + 995) // 2  # from there on as ever


def test_telling_what_was_not_asked_is_a_mistake() -> None:
    search = Search(SearchSpace())
    with pytest.raises(ValueError, match="told about batch size 5, but None was asked"):
        search.tell(5, True)


def test_what_is_untested_is_told() -> None:
    search, _ = run(100, tolerance=0.2)
    assert (search.best, search.exact, search.next_untested) == (96, False, 97)
    assert run(100)[0].next_untested is None


hints = st.lists(st.none() | st.integers(-(2**40), 2**40), max_size=12)


@settings(max_examples=400, deadline=None)
@given(
    st.integers(0, 2**21),
    st.integers(1, 300),
    st.integers(1, 2**20),
    st.integers(1, 130),
    st.sampled_from([0.0, 0.001, 0.01, 0.3]),
    hints,
    st.none() | st.integers(-5, 2**21),
)
def test_no_advice_breaks_the_guarantees(
    largest: int, smallest: int, more: int, multiple_of: int, tolerance: float, advice: list[int | None], start: int | None
) -> None:
    space = SearchSpace(min=smallest, max=smallest + multiple_of + more, multiple_of=multiple_of, tolerance=tolerance)
    search, asked = run(largest, Hints(advice, start=start), min=space.min, max=space.max, multiple_of=multiple_of, tolerance=tolerance)
    assert len(asked) == len(set(asked))
    assert all(space.first <= size <= space.last and size % multiple_of == 0 for size in asked)
    assert len(asked) <= 4 * math.log2(space.max) + 4
    true = min(largest // multiple_of * multiple_of, space.last)
    if true < space.first:
        assert (search.ending, search.best) == (Ending.NOTHING_FITS, None)
        return
    assert search.best in asked
    assert search.best is not None
    assert true * (1 - tolerance) <= search.best <= true
    if tolerance == 0:
        assert search.best == true
        assert search.exact


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=200), hints, st.sampled_from([0.0, 0.01]))
def test_verdicts_that_contradict_each_other_still_end_with_a_size_that_fitted(
    verdicts: list[bool], advice: list[int | None], tolerance: float
) -> None:
    search, told = Search(SearchSpace(max=2**20, tolerance=tolerance), Hints(advice)), {}
    while (size := search.ask()) is not None:
        assert size not in told
        told[size] = verdicts[len(told) % len(verdicts)]
        search.tell(size, told[size])
        assert len(told) <= 4 * 20 + 4
    assert search.best is None or told[search.best]
