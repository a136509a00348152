"""Kept plans as files: what is written, what is trusted, and that nothing about them can fail a search."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch import BatchPlan, Outcome, Probe
from autobatch.cache.recall import Question, recall, still_holds
from autobatch.cache.store import Origin, PlanCache
from autobatch.core.units import GIB, MIB

KEY, OTHER = "a" * 64, "a" * 16 + "b" * 48
PLAN = BatchPlan(
    batch_size=64, global_batch_size=64, limited_by="memory", best=64, wall=65, exact=True, budget=1000 * MIB, cap=950 * MIB, margin=0.05,
    peak_allocated=940 * MIB, device="cpu", notes=("as it was",), probes=(Probe(batch_size=64, outcome=Outcome.FIT),),
)  # fmt: skip


def origin(key: str = KEY, what: str = "Net") -> Origin:
    return Origin(key=key, made="2026-01-31T12:00:00+00:00", what=what)


def never() -> BatchPlan:
    raise AssertionError("it was measured again")


def question(cap: int = PLAN.cap, key: str = KEY) -> Question:
    return Question(what="Net", cap=lambda: cap, key=key)


@pytest.fixture
def store(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "home" / "plans")


def file_of(store: PlanCache) -> Path:
    return store.folder / f"{KEY[:16]}.json"


def test_a_kept_plan_is_the_users_alone_and_comes_back_equal(store: PlanCache) -> None:
    before = os.umask(0)
    try:
        assert store.save(origin(), PLAN) == ""
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file_of(store).stat().st_mode) == 0o600
    kept, note = store.load(KEY)
    assert kept is not None
    assert (kept.plan, kept.origin, note) == (PLAN, origin(), "")
    assert BatchPlan.from_json(file_of(store).read_text()) == PLAN
    assert os.listdir(store.folder) == [file_of(store).name]


def test_what_was_never_kept_is_no_news(store: PlanCache) -> None:
    assert store.load(KEY) == (None, "")
    assert (store.entries(), store.clear()) == (([], 0), (0, 0))


def edit(**changes: object) -> Callable[[Path], None]:
    """Return a way to damage a file: other values for these keys of its JSON."""

    def apply(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def another_users(path: Path) -> None:
    try:
        os.chown(path, 12345, 12345)
    except PermissionError:  # not root: what is writable for all is as good as another's
        path.chmod(0o666)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "is not JSON"),
        (lambda path: path.write_bytes(b""), "is not JSON"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "can't decode"),
        (lambda path: path.write_text("[" * 100_000), "is not JSON"),
        (lambda path: path.write_text("[1, 2]"), "no schema number"),
        (edit(schema=99), "schema 99; this autobatch reads up to 1"),
        (edit(batch_size="64\x1b[2J"), "batch_size is not a whole number"),
        (edit(peak_allocated=10**400), "peak_allocated is beyond any amount"),
        (edit(cache=None), "cache is not an object"),
        (edit(cache={"key": KEY, "made": "yesterday", "what": ""}), "yesterday"),
        (edit(cache=dataclasses.asdict(origin(OTHER))), "answers something else"),
        (link, "symbolic link"),
        (folder, "Is a directory|no plain file"),
        (pipe, "no plain file"),
        (another_users, "another user could have written it"),
        (lambda path: path.chmod(0o622), "another user could have written it"),
    ],
)
def test_what_cannot_be_trusted_is_passed_over_with_a_note(store: PlanCache, damage: Callable[[Path], None], why: str) -> None:
    store.save(origin(), PLAN)
    damage(file_of(store))
    kept, note = store.load(KEY)
    assert kept is None
    assert note.startswith(f"the cache's {file_of(store).name} was ignored: ")
    assert note.isprintable()
    assert re.search(why, note), note
    new = dataclasses.replace(PLAN, batch_size=32)
    plan = recall(store, question(), lambda: new)
    assert plan.notes[:2] == ("as it was", note)
    if damage is folder:
        assert "not kept in the cache: Is a directory" in plan.notes[2]
    else:
        assert len(plan.notes) == 2
        assert recall(store, question(), never).batch_size == 32
    if damage is link:
        assert BatchPlan.from_json((store.folder / "elsewhere").read_text()) == PLAN


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=300)
    | st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_no_bytes_in_a_file_can_raise(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = PlanCache(folder)
        file_of(store).write_bytes(data)
        kept, note = store.load(KEY)
        assert kept is None
        assert note.isprintable()
        assert store.entries() == ([], 1)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([f.name for f in dataclasses.fields(BatchPlan)]),
    st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.just({}), st.just([[]])),
)
def test_no_value_in_a_plan_can_raise(name: str, value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = PlanCache(folder)
        store.save(origin(), PLAN)
        edit(**{name: value})(file_of(store))
        kept, note = store.load(KEY)
        assert (kept is None) == (note != "")


@pytest.mark.parametrize("place", ["/dev/null/plans", "/proc/plans", "{file}", "{file}/plans"])
def test_a_folder_that_cannot_be_written_is_a_note(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    plan = recall(PlanCache(place.format(file=tmp_path / "file")), question(), lambda: PLAN)
    assert dataclasses.replace(plan, notes=PLAN.notes) == PLAN
    assert plan.notes[-1].startswith("not kept in the cache: ")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_a_note_and_leaves_nothing(store: PlanCache) -> None:
    store.save(origin(), PLAN)
    script = (
        "import resource, signal, sys\n"
        "from tests.test_cache import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "print(PlanCache(sys.argv[1]).save(origin(), dataclasses.replace(PLAN, batch_size=32)))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(store.folder)], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "not kept in the cache: File too large\n", done.stderr
    assert os.listdir(store.folder) == [file_of(store).name]
    assert recall(store, question(), never).batch_size == 64


def test_writers_at_the_same_time_never_show_half_a_plan(store: PlanCache) -> None:
    store.save(origin(), PLAN)
    script = (
        "import sys\nfrom tests.test_cache import *\n"
        "for size in range(200): PlanCache(sys.argv[1]).save(origin(), dataclasses.replace(PLAN, batch_size=size + 1))"
    )
    command = [sys.executable, "-c", script, str(store.folder)]
    writers = [subprocess.Popen(command, cwd=Path(__file__).parents[1]) for _ in range(3)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        kept, note = store.load(KEY)
        assert kept is not None, note
        seen.add(kept.plan.batch_size)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert len(seen) > 1
    assert os.listdir(store.folder) == [file_of(store).name]


def test_clear_takes_what_is_ours_and_nothing_else(store: PlanCache) -> None:
    store.save(origin(), PLAN)
    store.save(origin("b" * 64), PLAN)
    (store.folder / ".autobatch-x.tmp").write_text("cut off")
    (store.folder / "thesis.json").write_text("{}")
    entries, ignored = store.entries()
    assert ([kept.plan for kept in entries], ignored) == ([PLAN, PLAN], 1)
    assert store.clear() == (3, 0)
    assert os.listdir(store.folder) == ["thesis.json"]


@pytest.mark.parametrize(
    ("changes", "cap", "holds"),
    [
        ({}, 950 * MIB, True),
        ({}, 950 * MIB - 1, False),  # no allocator tells what was reserved: the cap itself must be there
        ({}, 990 * MIB, True),
        ({}, 1000 * MIB, False),  # there may be more to have
        ({"peak_reserved": 945 * MIB}, 945 * MIB, True),  # all that the allocator ever asked for
        ({"peak_reserved": 945 * MIB}, 945 * MIB - 1, False),
        ({"limited_by": "dataset"}, 80 * GIB, True),
        ({"limited_by": "max_batch_size"}, 80 * GIB, True),
        ({"limited_by": "throughput"}, 80 * GIB, False),
        ({"limited_by": "time_limit"}, 80 * GIB, False),
        ({"limited_by": "dataset"}, 949 * MIB, False),
    ],
)
def test_a_plan_holds_where_it_fits_and_is_still_the_largest(changes: dict[str, object], cap: int, holds: bool) -> None:
    assert still_holds(dataclasses.replace(PLAN, **changes), cap) is holds  # type: ignore[arg-type]


def test_a_plan_that_no_longer_fits_is_measured_again_and_says_why(store: PlanCache) -> None:
    store.save(origin(), PLAN)
    smaller = dataclasses.replace(PLAN, batch_size=32, cap=500 * MIB)
    plan = recall(store, question(cap=500 * MIB), lambda: smaller)
    assert plan.batch_size == 32
    assert plan.notes[-1] == "the plan in the cache was not used: it was measured with 950.0 MiB for a trial, and now it is 500.0 MiB"
    again = recall(store, question(cap=500 * MIB), never)
    assert again.notes == ("as it was", again.notes[-1])
    assert again.notes[-1].startswith("from the cache: measured on 20")
