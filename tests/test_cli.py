"""The command line as a user meets it: real processes, their output, their exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import psutil
import pytest

from autobatch import BatchPlan
from autobatch.cli import group
from autobatch.cli.cache import cache
from autobatch.cli.progress import Display
from autobatch.core.records import Outcome, Probe, Trying

TARGETS = """
import os, signal, sys, time
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.weight, self.act = nn.Parameter(torch.ones(262144)), act
    def forward(self, x):
        if self.act is not None and len(x) >= 2:
            self.act()
        return (x * self.weight).square().mean()

def step(net, batch): return net(batch)
def build(act=None, **more):
    return {"model": Net(act), "sample": torch.ones(1, 1), "step": step, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1), **more}
def data(): return build(dataset_size=100, epochs=3)
def prints():
    print('{"batch_size": 9999}')
    return build()
def escape(): raise RuntimeError("\\x1b[2Jgone")
def killed(): return build(lambda: os.kill(os.getpid(), signal.SIGKILL))
def hangs(): return build(lambda: time.sleep(1000))
def wrong(): return 42
def shapes(): return nn.Linear(3, 2), torch.ones(4, 5)
"""

FAST = ("--device", "cpu", "--memory-budget", "64MiB")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TARGETS)
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "autobatch", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)


def environment() -> dict[str, str]:
    import autobatch

    return {**os.environ, "PYTHONPATH": str(Path(autobatch.__file__).parents[1]), "COLUMNS": "120"}


def test_a_plan_goes_to_standard_output_and_everything_else_beside_it(folder: Path) -> None:
    done = run(folder, "probe", "train.py:prints", *FAST, "--tolerance", "0", "--json")
    assert done.returncode == 0, done.stderr
    plan = BatchPlan.from_json(done.stdout)
    assert json.loads(done.stdout)["schema"] == 1
    assert plan.limited_by == "memory"
    assert plan.exact
    assert '{"batch_size": 9999}' in done.stderr
    lines = done.stderr.splitlines()
    assert any(re.search(rf"\b{plan.batch_size}\b.*\bfit", line) for line in lines)
    assert any(re.search(rf"\b{plan.wall}\b.*(oom|out of memory)", line) for line in lines)
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ("text", r"batch size 8 · learning rate 0\.00313 · 13 iterations per epoch\n"),
        ("args", r"--batch-size 8 --lr 0\.003125\n"),
        ("env", r"AUTOBATCH_BATCH_SIZE=8\nAUTOBATCH_LR=0\.003125\n(AUTOBATCH_.*\n)*"),
    ],
)
def test_answers_for_people_and_for_job_scripts(folder: Path, form: str, pattern: str) -> None:
    done = run(folder, "probe", "train.py:data", *FAST, "--max-batch-size", "8", "--format", form)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(pattern, done.stdout)


def test_what_the_target_says_counts_and_the_command_line_stands_above_it(folder: Path) -> None:
    done = run(folder, "probe", "train.py:data", *FAST, "--max-batch-size", "8", "--epochs", "2", "--json")
    plan = BatchPlan.from_json(done.stdout)
    assert (plan.dataset_size, plan.steps_per_epoch, plan.total_steps) == (100, 13, 26)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("probe",), 2, "Missing argument 'TARGET'"),
        (("probe", "train.py:build", "--objective", "speed"), 2, "'speed' is not one of"),
        (("probe", "train.py:build", *FAST, "--steps", "1"), 2, "steps is 1; 2 or more are needed"),
        (("probe", "train.py:build", *FAST, "--margin", "1.5"), 2, "margin"),
        (("probe", "train.py:build", "--memory-budget", "20GB"), 2, "Write 20GiB"),
        (("probe", "train.py:build", "--memory-budget", "lots"), 2, "'lots' is not an amount of memory"),
        (("probe", "train.py:build", "--device", "cpu", "--memory-budget", "900TiB"), 2, "900.00 TiB"),
        (("probe", "nowhere.py:build"), 2, "There is no file 'nowhere.py'"),
        (("probe", "train.py:biuld", *FAST), 2, "train.py has no function 'biuld'"),
        (("probe", "train.py:build", "--device", "cuda:99"), 3, "CUDA"),
        (("probe", "train.py:build", "--device", "cpu", "--memory-budget", "2MiB"), 4, "Not even batch size 1 fits"),
        (("probe", "train.py:wrong", *FAST), 5, "train.py:wrong returned a int; wanted is a Workload"),
        (("probe", "train.py:shapes", *FAST), 5, "the workload failed at batch size 1, for reasons of its own (not memory)"),
        (("probe", "train.py:killed", *FAST, "--max-batch-size", "2"), 6, "The worker was killed by SIGKILL at batch size 2"),
        (
            ("probe", "train.py:hangs", *FAST, "--max-batch-size", "2", "--probe-timeout", "1"),
            6,
            "gave no answer within 1 seconds at batch size 2",
        ),
    ],
)
def test_every_way_to_fail_has_its_code_and_one_message(folder: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = run(folder, *arguments)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert message in done.stderr
    assert "autobatch/probe" not in done.stderr


def test_the_users_traceback_is_shown_with_nothing_of_ours_and_no_control_characters(folder: Path) -> None:
    done = run(folder, "probe", "train.py:escape", *FAST)
    assert done.returncode == 5
    assert "in escape" in done.stderr
    assert "\x1b" not in done.stderr


def test_an_interrupt_stops_the_worker_within_a_second_and_says_what_was_known(folder: Path) -> None:
    command = [sys.executable, "-m", "autobatch", "probe", "train.py:hangs", *FAST]
    with subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seen = ""
        while not re.search(r"\b1\b.*\bfit", seen):
            seen = process.stderr.readline()
            assert seen, "the command ended before its first probe"
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        _, rest = process.communicate()
        seconds = time.monotonic() - asked
    assert process.returncode == 130
    assert "interrupted; the worker was stopped. So far: 1 fits. Nothing was confirmed." in rest
    assert "Traceback" not in rest
    assert [child for child in children if child.is_running()] == []
    assert seconds < 5  # a hang, not a speed: the step sleeps for 1000 s


def test_an_interrupt_right_after_a_result_does_not_deny_it() -> None:
    stream = io.StringIO()
    display = Display(stream)
    display(Trying(batch_size=1))
    display(Probe(batch_size=1, outcome=Outcome.FIT))
    display.interrupted()
    assert "So far: 1 fits. Nothing was confirmed." in stream.getvalue()


def test_devices_shows_capacity_budget_and_why(folder: Path) -> None:
    done = run(folder, "devices", "--memory-budget", "1GiB")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^cpu  CPU, \d+ cores$", done.stdout, re.MULTILINE)
    assert re.search(r"^  capacity  [\d.]+ GiB$", done.stdout, re.MULTILINE)
    assert "  budget    1.00 GiB: a trial may use 972.8 MiB, 51.2 MiB stay free as margin\n" in done.stdout
    listed = json.loads(run(folder, "devices", "--json").stdout)
    assert listed[-1]["name"] == "cpu"
    assert listed[-1]["reading"]["capacity"] >= listed[-1]["budget"] > listed[-1]["cap"]


def test_the_options_are_frozen() -> None:
    """An option is a promise to job scripts: adding one is a decision, renaming or dropping one breaks somebody's night."""
    options = {name: sorted(o for p in command.params for o in p.opts) for name, command in group.commands.items()}
    assert options == {
        "cache": [],
        "devices": ["--json", "--margin", "--memory-budget"],
        "estimate": [
            "--all-gpus", "--base-batch-size", "--base-lr", "--context", "--dataset-size", "--drop-last", "--epochs", "--explain",
            "--global-batch-size", "--gpu", "--json", "--lr-rule", "--margin", "--max-batch-size", "--memory-budget",
            "--min-batch-size", "--mode", "--multiple-of", "--noise-scale", "--optimizer", "--precision", "--tolerance", "target",
        ],
        "explain": ["file"],
        "probe": [
            "--base-batch-size", "--base-lr", "--cache", "--dataset-size", "--device", "--drop-last", "--epochs", "--fast-enough",
            "--format", "--global-batch-size", "--json", "--lr-rule", "--margin", "--max-batch-size", "--memory-budget",
            "--min-batch-size", "--mode", "--multiple-of", "--noise-scale", "--objective", "--optimizer", "--precision",
            "--probe-timeout", "--steps", "--time-limit", "--tolerance", "target",
        ],
    }  # fmt: skip
    assert {name: command.params for name, command in cache.commands.items()} == {"clear": [], "list": []}
    assert all(p.help for command in group.commands.values() for p in command.params if isinstance(p, click.Option) and not p.show_default)
