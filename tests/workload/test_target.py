from __future__ import annotations

from pathlib import Path

import pytest

from autobatch import InvalidRequest, WorkloadFailed
from autobatch.workload.target import load_target

GOOD = """
import torch
def pair(): return torch.nn.Linear(2, 2), torch.ones(3, 2)
def options(): return {"model": torch.nn.Linear(2, 2), "sample": torch.ones(3, 2), "optimizer": "adamw", "base_lr": 0.5, "epochs": 7}
def custom(): return {**options(), "lr_rule": lambda base, batch, base_batch: base}
def workload():
    import autobatch
    return autobatch.build_workload(*pair())
def wrong(): return 42
def unknown(): return {"model": torch.nn.Linear(2, 2), "sample": torch.ones(3, 2), "batchsize": 3}
def broken(): raise RuntimeError("no data here")
nothing = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_train.py").write_text(GOOD)
    (tmp_path / "bad_train.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("place", ["my_train.py", "my_train"])
def test_a_function_may_return_three_things(folder: Path, place: str) -> None:
    for name in ("pair", "workload"):
        workload, defaults = load_target(f"{place}:{name}", {})
        assert workload.make_batch(5).shape == (5, 2)
        assert defaults == {}
    workload, defaults = load_target(f"{place}:options", {})
    assert type(workload.optimizer).__name__ == "AdamW"
    assert workload.group_lrs == (0.5,)
    assert defaults == {"base_lr": 0.5, "epochs": 7}


def test_what_the_command_line_says_stands_above_the_target(folder: Path) -> None:
    workload, _ = load_target("my_train.py:options", {"optimizer": "sgd", "base_lr": 0.25, "precision": "bf16", "mode": None})
    assert (type(workload.optimizer).__name__, workload.group_lrs, workload.precision) == ("SGD", (0.25,), "bf16")
    workload, _ = load_target("my_train.py:options", {"optimizer": "none"})
    assert workload.optimizer is None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("elsewhere.py:build", r"There is no file 'elsewhere.py' \(looked in "),
        (
            "my_train.py:biuld",
            r"my_train.py has no function 'biuld' \(its functions: pair, options, custom, workload, wrong, unknown, broken\)",
        ),
        ("my_train.py:nothing", "has no function 'nothing'"),
        ("no_such_module:build", "There is no module 'no_such_module' here"),
        ("my_train.py", "TARGET 'my_train.py' names no function. Write path/to/train.py:build"),
        ("example:nope", "There is no example 'nope'. Known: digits, gpt."),
        ("timm:resnet50", "timm:resnet50 needs the package 'timm', which is not installed. Type: pip install timm"),
        ("torchvision:resnet18", "needs the package 'torchvision', which is not installed. Type: pip install torchvision$"),
    ],
)
def test_a_target_that_is_not_there_says_what_to_type(folder: Path, target: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        load_target(target, {})


def test_an_optimizer_that_is_not_there_names_the_known_ones(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no optimizer 'sdg' in torch.optim. Known: none, .*adamw.*sgd"):
        load_target("my_train.py:options", {"optimizer": "sdg"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", "my_train.py:wrong returned a int; wanted is a Workload"),
        ("unknown", "returned options that find does not have: batchsize"),
        ("custom", r"returned a function as lr_rule, which the worker cannot hand over\. Name a rule"),
    ],
)
def test_a_function_that_returns_something_else_failed(folder: Path, name: str, message: str) -> None:
    with pytest.raises(WorkloadFailed, match=message):
        load_target(f"my_train.py:{name}", {})


def test_the_users_own_errors_come_out_as_they_are(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="no data here"):
        load_target("my_train.py:broken", {})
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        load_target("bad_train:build", {})
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        load_target("bad_train.py:build", {})
