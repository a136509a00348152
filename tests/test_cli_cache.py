"""``--cache``, ``autobatch cache`` and ``autobatch explain`` as a user meets them; what hostile text can do to a terminal: nothing."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import autobatch
from autobatch import BatchPlan, Outcome, Probe
from autobatch.cache.sources import sources
from autobatch.cli.progress import Display
from autobatch.report.lines import args_line, env_lines

TARGETS = """
import sys
import torch
from torch import nn
from helpers.sizes import WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
    def forward(self, x):
        print("RUN", file=sys.stderr)
        return (x * self.weight).square().mean()

def build(): return {"model": Net(), "sample": torch.ones(1, 1), "step": lambda net, batch: net(batch), "optimizer": torch.optim.SGD}
def noisy():
    sys.stderr.write("\\x1b]0;owned\\x07\\x1b[2J\\x1b[31mred\\x1b[0m \\u202egnp.exe \\x9b5A\\x07\\n")
    return build()
def escape():
    raise RuntimeError("\\x1b]0;owned\\x07\\x1b[2Jgone \\u202efdp\\nsecond line\\x9b2J")
"""
FAST = ("--device", "cpu", "--memory-budget", "64MiB", "--max-batch-size", "2")
HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202efdp.\x9b1m\r\nrm -rf ~; $(reboot) `x`"
PLAN = BatchPlan(
    batch_size=64, global_batch_size=128, accumulation_steps=2, lr=0.1, group_lrs=(0.1, 0.2), lr_scale=2.0, lr_rule=HOSTILE,
    lr_formula=HOSTILE, base_lr=0.05, limited_by=HOSTILE, best=64, wall=65, exact=True, evidence=HOSTILE, budget=1000, cap=950, margin=0.05,
    device=HOSTILE, device_description=HOSTILE, environment={HOSTILE: HOSTILE}, notes=(HOSTILE,),
    probes=(Probe(batch_size=64, outcome=Outcome.FIT, notes=(HOSTILE,)), Probe(batch_size=65, outcome=Outcome.CRASHED, message=HOSTILE)),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TARGETS)
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "sizes.py").write_text("from .more import WIDTH\n")
    (tmp_path / "helpers" / "more.py").write_text("WIDTH = 4096\n")
    (tmp_path / "unrelated.py").write_text("")
    return tmp_path


def run(folder: Path, *arguments: str, stdin: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    path = str(Path(autobatch.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "XDG_CACHE_HOME": str(folder / "cache"), **more}
    command = [sys.executable, "-m", "autobatch", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, input=stdin)


def is_safe(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_a_plan_is_kept_shown_again_listed_explained_and_removed(folder: Path) -> None:
    first = run(folder, "probe", "train.py:build", *FAST, "--cache", "--json")
    assert first.returncode == 0, first.stderr
    assert "RUN" in first.stderr
    assert re.search(r"\b2\b +fits, confirmed", first.stderr)
    (folder / "unrelated.py").write_text("changed = True")
    again = run(folder, "probe", "train.py:build", *FAST, "--cache", "--json")
    assert again.returncode == 0, again.stderr
    assert "RUN" not in again.stderr
    assert "fits" not in again.stderr.partition("limited by")[0]
    plans = [BatchPlan.from_json(done.stdout) for done in (first, again)]
    assert re.fullmatch(r"from the cache: measured on 20.{14} UTC; cache=False \(--no-cache\) measures again", plans[1].notes[-1])
    assert dataclasses.replace(plans[1], notes=plans[0].notes) == plans[0]

    listed = run(folder, "cache", "list")
    header, line = listed.stdout.splitlines()
    assert header.split() == ["measured", "what", "device", "batch", "size", "file"]
    assert re.fullmatch(rf"20\S+ \S+ UTC  train\.py:build  CPU, \d+ cores  2 +{folder}/cache/autobatch/plans/\w+\.json", line)
    explained = run(folder, "explain", line.split()[-1])
    assert explained.returncode == 0, explained.stderr
    shown = first.stderr[first.stderr.index("batch size  ") :]
    assert explained.stdout.splitlines() == [one for one in shown.splitlines() if one != "RUN"]
    assert run(folder, "cache", "clear").stdout == f"Removed 1 plan from {folder}/cache/autobatch/plans.\n"
    assert run(folder, "cache", "list").stdout == f"No plans are kept in {folder}/cache/autobatch/plans.\n"


def test_what_changed_is_measured_again_and_off_is_the_default(folder: Path) -> None:
    command = ("probe", "train.py:build", *FAST)
    assert "RUN" in run(folder, *command).stderr
    assert not (folder / "cache").exists()
    assert "RUN" in run(folder, *command, "--cache").stderr
    assert "RUN" in run(folder, *command, "--cache", "--margin", "0.06").stderr
    (folder / "helpers" / "more.py").write_text("WIDTH = 8192\n")
    assert "RUN" in run(folder, *command, "--cache").stderr
    assert "RUN" not in run(folder, *command, "--cache").stderr
    assert "RUN" in run(folder, *command, "--cache", "--no-cache").stderr


def test_a_target_is_its_files_and_what_they_import_from_beside_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names = {"train.py", "helpers/sizes.py", "helpers/more.py"}
    assert {str(Path(path).relative_to(folder)) for path in sources("train.py:build")} == names
    before = sources("train.py:build")
    (folder / "helpers" / "__init__.py").write_text("")
    assert set(sources("train.py:build")) - set(before) == {str(folder / "helpers" / "__init__.py")}
    (folder / "project").mkdir()
    (folder / "project" / "__init__.py").write_text("from . import extra")
    (folder / "project" / "extra.py").write_text("import helpers.more, torch, numpy.linalg")
    (folder / "project" / "train.py").write_text("def build():\n    from .. import nowhere\n    from helpers import sizes as s\n")
    found = {str(Path(path).relative_to(folder)) for path in sources("project.train:build")}
    assert found == {f"project/{name}.py" for name in ("__init__", "extra", "train")} | {"helpers/__init__.py", *names} - {"train.py"}
    assert sources("torch.nn.functional:relu").keys() >= {torch.__file__, torch.nn.functional.__file__}
    assert sources("example:gpt").keys() == {"example"}


@pytest.mark.parametrize(
    ("target", "code", "message"),
    [
        ("nowhere.py:build", 2, "There is no file 'nowhere.py'"),
        ("nothing", 2, "names no function"),
        ("train.py:escape", 5, "the workload failed"),
        ("broken.py:build", 5, "SyntaxError"),
    ],
)
def test_what_fails_fails_as_without_a_cache(folder: Path, target: str, code: int, message: str) -> None:
    (folder / "broken.py").write_text("def build(:")
    done = run(folder, "probe", target, *FAST, "--cache")
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "autobatch/c" not in done.stderr
    assert is_safe(done.stderr)
    assert not (folder / "cache").exists()


def test_no_device_fails_as_without_a_cache(folder: Path) -> None:
    done = run(folder, "probe", "train.py:build", "--device", "cuda:99", "--cache")
    assert done.returncode == 3, done.stderr


def test_a_cache_that_cannot_be_written_is_a_note(folder: Path) -> None:
    done = run(folder, "probe", "train.py:build", *FAST, "--cache", "--json", XDG_CACHE_HOME="/dev/null")
    assert done.returncode == 0, done.stderr
    assert BatchPlan.from_json(done.stdout).notes[-1] == "not kept in the cache: Not a directory (/dev/null/autobatch/plans)"


def test_a_list_names_what_it_ignores(folder: Path) -> None:
    plans = folder / "cache" / "autobatch" / "plans"
    plans.mkdir(parents=True)
    (plans / "0123456789abcdef.json").write_text("{")
    plan = {**dataclasses.replace(PLAN, device_description=HOSTILE).to_dict()}
    plan["cache"] = {"key": "f" * 64, "made": "2026-01-31T12:00:00+00:00", "what": HOSTILE}
    (plans / f"{'f' * 16}.json").write_text(json.dumps(plan))
    done = run(folder, "cache", "list")
    assert len(done.stdout.splitlines()) == 2
    assert is_safe(done.stdout)
    assert done.stderr == "1 that cannot be read or trusted is ignored; autobatch cache clear removes them.\n"


def test_a_hostile_plan_is_only_text(folder: Path) -> None:
    (folder / "plan.json").write_text(PLAN.to_json())
    done = run(folder, "explain", "plan.json")
    assert done.returncode == 0, done.stderr
    assert is_safe(done.stdout)
    assert r"\x1b]0;owned\x07\x1b[2J\u202efdp.\x9b1m\r\nrm" in done.stdout
    assert run(folder, "explain", "-", stdin=PLAN.to_json()).stdout == done.stdout
    assert all(line.isprintable() for line in str(PLAN).split("\n"))
    assert len(str(PLAN).split("\n")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "The plan is not JSON"),
        (b"\xff", "plan.json is not text in UTF-8"),
        (b'{"schema": 7}', "The plan has schema 7"),
        (b'{"schema": 1, "batch_size": "\\u001b[2J"}', "The plan is damaged: batch_size is not a whole number"),
        (b'{"schema": 1, "\\u001b[2J', "The plan is not JSON"),
    ],
)
def test_what_is_no_plan_is_said_in_one_line(folder: Path, content: bytes, message: str) -> None:
    (folder / "plan.json").write_bytes(content)
    done = run(folder, "explain", "plan.json")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert message in done.stderr
    assert is_safe(done.stderr)


def test_a_plan_that_is_not_there_is_a_usage_error(folder: Path) -> None:
    done = run(folder, "explain", f"{HOSTILE}.json")
    assert done.returncode == 2
    assert "No such file" in done.stderr
    assert is_safe(done.stderr)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([f.name for f in dataclasses.fields(BatchPlan)]),
    st.one_of(st.integers(), st.floats(), st.text(), st.lists(st.text()), st.dictionaries(st.text(), st.text())),
)
def test_no_value_makes_explain_fail_or_shows_a_control_character(name: str, value: object) -> None:
    from click.testing import CliRunner

    from autobatch.cli import group
    from autobatch.core.errors import InvalidRequest

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "plan.json"
        path.write_text(json.dumps({**PLAN.to_dict(), name: value}))
        done = CliRunner().invoke(group, ["explain", str(path)])
    assert done.exception is None or isinstance(done.exception, InvalidRequest)
    assert is_safe(done.stdout)


def test_answers_for_job_scripts_are_numbers_alone() -> None:
    assert re.fullmatch(r"[\w. -]+", args_line(PLAN))
    assert all(re.fullmatch(r"[A-Z_]+=[\w.+-]+", line) for line in env_lines(PLAN))
    run_by_shell = subprocess.run(["sh", "-c", "\n".join(env_lines(PLAN)) + "\necho $AUTOBATCH_LR"], capture_output=True, text=True)
    assert (run_by_shell.stdout, run_by_shell.stderr) == ("0.1\n", "")


def test_what_the_workload_writes_or_raises_cannot_steer_the_terminal(folder: Path) -> None:
    noisy = run(folder, "probe", "train.py:noisy", *FAST)
    assert noisy.returncode == 0, noisy.stderr
    assert is_safe(noisy.stderr)
    assert r"red \u202egnp.exe \x9b5A\x07" in noisy.stderr
    assert "owned" not in noisy.stderr
    escape = run(folder, "probe", "train.py:escape", *FAST)
    assert escape.returncode == 5
    assert is_safe(escape.stderr)
    assert r"RuntimeError: \x1b]0;owned\x07\x1b[2Jgone \u202efdp" in escape.stderr
    option = run(folder, "probe", "train.py:build", f"--{HOSTILE}")
    assert option.returncode == 2
    assert is_safe(option.stderr)
    target = run(folder, "probe", f"{HOSTILE}.py:build", *FAST)
    assert target.returncode == 2
    assert is_safe(target.stderr)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("plain\n", "plain"),
        ("a\tb\n", "a       b"),
        ("\x1b[31mred\x1b[0m\n", "\x1b[31mred\x1b[0m"),
        ("\x1b[1;38;5;9mbold\x1b[0m\n", "\x1b[1;91mbold\x1b[0m"),
        ("10%\r50%\r100%\n", "100%"),
        ("windows\r\n", "windows"),
        ("up\x1b[3A and \x1b[2Jclear\x1b[?25l\n", "up and clear"),
        ("\x1b]0;title\x07t \x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\\n", "t link"),
        ("\x1bPq#0\x1b\\sixel\n", "sixel"),
        ("bell\x07 nul\x00 c1\x9b2J lone\x1b end\n", r"bell\x07 nul\x00 c1\x9b2J lone\x1b end"),
        ("\x1b]0;never ends\n", r"\x1b]0;never ends"),
        ("\u202ertl\n", r"\u202ertl"),
    ],
)
def test_colours_of_the_users_program_are_shown_and_nothing_else_of_it_is_obeyed(written: str, shown: str) -> None:
    stream = io.StringIO()
    display = Display(stream)
    display._console = Console(file=stream, highlight=False, soft_wrap=True, force_terminal=True, color_system="256", legacy_windows=False)
    display.write(written)
    assert stream.getvalue() == shown + "\n"


def test_the_help_says_whose_code_it_runs(folder: Path) -> None:
    for command in ("probe", "estimate"):
        assert re.search(r"TARGET is code that you choose to run", run(folder, command, "--help").stdout)


def test_a_model_goes_to_its_worker_without_any_file(tmp_path: Path) -> None:
    script = """if True:
        import os, sys
        from pathlib import Path
        import torch, autobatch
        places = [Path(os.environ["TMPDIR"]), Path.home(), Path.cwd()]
        def files(event): print(*[str(p) for place in places for p in place.rglob("*") if p.is_file()], type(event).__name__)
        model = torch.nn.Linear(4, 4)
        autobatch.find(model, torch.ones(2, 4), device="cpu", memory_budget="64MiB", max_batch_size=4, isolate=True, progress=files)
        files(None)
    """
    for name in ("tmp", "home", "work"):
        (tmp_path / name).mkdir()
    environment = {"TMPDIR": str(tmp_path / "tmp"), "HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(autobatch.__file__).parents[1])}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "TORCH"))} | environment
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "work", env=environment, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == {"Setting", "Trying", "Probe", "NoneType"}
