"""``find(…, cache=)``: the same question finds the same answer without a trial, and any change of it is another question."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import autobatch
from autobatch.cache.recall import question_of_step
from autobatch.cache.store import PlanCache
from autobatch.core.options import PlanRequest, SearchOptions

X, Y = torch.randn(6, 8), torch.randint(0, 4, (6,))
SCALE = 1.0


class Net(nn.Module):
    def __init__(self, width: int = 8, wide: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.wide = nn.Linear(8, width), nn.Linear(width, 4), wide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


class Other(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).tanh())


def helper(x: torch.Tensor) -> torch.Tensor:
    return x * SCALE


def step(model: nn.Module, batch: Any) -> torch.Tensor:
    return helper(model(batch[0])).sum()


def closed(factor: object) -> Callable[..., torch.Tensor]:
    return lambda output, target: F.cross_entropy(output, target) * len(repr(factor))


def key(model: nn.Module | None = None, **changes: Any) -> str:
    what = dict.fromkeys(("loss_fn", "optimizer", "step", "make_batch", "precision"))
    what |= {"model": model or Net(), "sample": (X, Y), "mode": "train"}
    where = {"device": "cpu", "memory_budget": "64MiB", "margin": 0.05}
    options: dict[str, Any] = {"options": SearchOptions(), "request": PlanRequest()}
    for name, value in changes.items():
        next(part for part in (what, where, options) if name in part)[name] = value
    found, _ = question_of_step(what, where, options)
    return found.key or found.why_not


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def changed(change: Callable[[Net], object]) -> Net:
    model = Net()
    change(model)
    return model


def used(model: Net, kind: type[torch.optim.Optimizer], **options: Any) -> dict[str, Any]:
    """Return a model and an optimizer that has state."""
    optimizer = kind(model.parameters(), lr=0.1, **options)
    model(X).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


class Sensitive(nn.Linear):
    def __init__(self, value: object) -> None:
        super().__init__(8, 4)
        self.value = value


OTHERS: dict[str, Callable[[], str]] = {
    "model's width": lambda: key(Net(9)),
    "model's class": lambda: key(Other()),
    "a plain attribute of the model": lambda: key(Net(wide=True)),
    "dtype": lambda: key(Net().double()),
    "frozen weight": lambda: key(changed(lambda net: net.head.weight.requires_grad_(False))),
    "buffer": lambda: key(changed(lambda net: net.register_buffer("b", torch.zeros(3)))),
    "hook": lambda: key(changed(lambda net: net.register_forward_hook(lambda *_: None))),
    "mode of a part": lambda: key(changed(lambda net: net.head.eval())),
    "a method put in place": lambda: key(changed(lambda net: setattr(net, "forward", functools.partial(Other.forward, net)))),
    "one more weight": lambda: key(changed(lambda net: net.register_parameter("more", nn.Parameter(net.head.weight.clone())))),
    "the same weight twice": lambda: key(changed(lambda net: net.register_parameter("more", net.head.weight))),
    "gradients that are there": lambda: key(changed(lambda net: net(X).sum().backward())),
    "sample's width": lambda: key(nn.Linear(9, 4), sample=(torch.ones(6, 9), Y)),
    "sample's dtype": lambda: key(sample=(X.double(), Y)),
    "sample's nest": lambda: key(sample=[X, Y]),
    "data set": lambda: key(sample=TensorDataset(X, Y)),
    "a longer data set": lambda: key(sample=TensorDataset(X[:5], Y[:5])),
    "loss_fn": lambda: key(loss_fn=F.cross_entropy),
    "another loss_fn": lambda: key(loss_fn=F.nll_loss),
    "a module as loss_fn": lambda: key(loss_fn=nn.CrossEntropyLoss()),
    "its options": lambda: key(loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1)),
    "closure": lambda: key(loss_fn=closed(1)),
    "closure's value": lambda: key(loss_fn=closed(22)),
    "step": lambda: key(step=step),
    "make_batch": lambda: key(make_batch=lambda rows: (torch.ones(rows, 8), Y[:1])),
    "make_batch's constant": lambda: key(make_batch=lambda rows: (torch.zeros(rows, 8), Y[:1])),
    "optimizer": lambda: key(optimizer=momentum),
    "optimizer by class": lambda: key(optimizer=torch.optim.AdamW),
    "partial": lambda: key(optimizer=functools.partial(torch.optim.SGD, lr=0.1)),
    "partial's options": lambda: key(optimizer=functools.partial(torch.optim.SGD, lr=0.2)),
    "optimizer with state": lambda: key(**used(Net(), torch.optim.SGD, momentum=0.9)),
    "optimizer without": lambda: key(**used(Net(), torch.optim.SGD)),
    "mode": lambda: key(mode="eval"),
    "precision": lambda: key(precision="bf16"),
    "memory_budget": lambda: key(memory_budget="65MiB"),
    "margin": lambda: key(margin=0.06),
    "tolerance": lambda: key(options=SearchOptions(tolerance=0)),
    "max_batch_size": lambda: key(options=SearchOptions(max_batch_size=7)),
    "base_lr": lambda: key(request=PlanRequest(base_lr=0.1)),
    "lr_rule": lambda: key(request=PlanRequest(lr_rule=lambda lr, new, old: lr)),
    "lr_rule's code": lambda: key(request=PlanRequest(lr_rule=lambda lr, new, old: lr + 1)),
}


def test_every_ingredient_makes_another_key() -> None:
    keys = {name: make() for name, make in OTHERS.items()}
    keys["nothing"] = key()
    assert [name for name, text in keys.items() if len(text) != 64] == []
    same = {text: [name for name in keys if keys[name] == text] for text in keys.values()}
    assert [names for names in same.values() if len(names) > 1] == []
    assert {name: make() for name, make in OTHERS.items()} == {name: keys[name] for name in OTHERS}


def test_code_that_is_called_counts_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(step=step)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    scaled = key(step=step)
    monkeypatch.setitem(globals(), "helper", lambda x: x.exp())
    assert len({before, scaled, key(step=step)}) == 3
    plain = key()
    monkeypatch.setattr(Net, "forward", Other.forward)
    assert key() != plain


def test_switches_versions_and_variables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [key()]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    keys.append(key())
    monkeypatch.setattr("autobatch.cache.recall.__version__", "9.9")
    keys.append(key())
    with torch.autocast("cpu"):
        keys.append(key())
    assert len(set(keys)) == 4


def test_rows_values_and_weights_do_not_count() -> None:
    assert key(sample=(X[:2] + 1, Y[:2])) == key()
    torch.manual_seed(99)
    assert key() == key()


class Stream(IterableDataset[Any]):
    read = 0

    def __iter__(self) -> Iterator[Any]:
        for row in zip(X, Y, strict=True):
            Stream.read += 1
            yield row


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (threading.Lock(), r"model\.value is a lock, which cannot be described \(TypeError: cannot pickle"),
        ([lambda: 1, (n for n in ())], r"model\.value\[1\] is a generator"),
        (functools.reduce(lambda inner, _: [inner], range(5000), None), "nested too deeply"),
        ([[] for _ in range(250_000)], "among more than 200,000 objects"),
    ],
)
def test_what_cannot_be_described_is_not_kept_and_says_so(tmp_path: Path, value: object, where: str) -> None:
    model = Sensitive(value)
    arguments: dict[str, Any] = {"device": "cpu", "memory_budget": "64MiB", "max_batch_size": 1, "isolate": False, "cache": tmp_path}
    plan = autobatch.find(model, (X, Y), loss_fn=F.cross_entropy, **arguments)
    assert plan.batch_size == 1
    assert re.search(f"^not kept in the cache: .*{where}", plan.notes[-1]), plan.notes[-1]
    assert os.listdir(tmp_path) == []


def test_a_hit_runs_nothing_reads_nothing_twice_and_changes_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    arguments: dict[str, Any] = {"device": "cpu", "memory_budget": "64MiB", "max_batch_size": 3, "cache": tmp_path / "plans"}
    calls: list[int] = []

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target)

    loader = DataLoader(Stream(), batch_size=2)
    Stream.read = 0
    first = autobatch.find(model, loader, loss_fn=loss_fn, optimizer=optimizer, progress=lambda _: calls.append(1), **arguments)
    once = Stream.read
    assert calls
    calls.clear()
    before = random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist(), [p.data_ptr() for p in model.parameters()]
    events: list[object] = []
    watching, seen = threading.Event(), set[int]()

    def watch() -> None:
        while not watching.is_set():
            seen.update(child.pid for child in psutil.Process().children())

    watcher = threading.Thread(target=watch)
    watcher.start()
    again = autobatch.find(model, loader, loss_fn=loss_fn, optimizer=optimizer, progress=events.append, **arguments)
    watching.set()
    watcher.join()
    after = random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist(), [p.data_ptr() for p in model.parameters()]
    assert (events, seen, after == before) == ([], set(), True)
    assert once <= 3  # the first rows alone, and them once
    assert Stream.read == 2 * once
    assert dataclasses.replace(again, notes=first.notes) == first
    assert again.notes[:-1] == first.notes
    assert again.notes[-1].endswith("; cache=False (--no-cache) measures again")
    autobatch.find(model, loader, loss_fn=loss_fn, optimizer=optimizer, progress=events.append, **{**arguments, "cache": False})
    assert events


def test_true_means_the_users_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments: dict[str, Any] = {"device": "cpu", "memory_budget": "64MiB", "max_batch_size": 1, "isolate": False}
    autobatch.find(Net(), (X, Y), loss_fn=F.cross_entropy, **arguments)
    assert os.listdir(tmp_path) == []
    autobatch.find(Net(), (X, Y), loss_fn=F.cross_entropy, cache=True, **arguments)
    entries, _ = PlanCache().entries()
    assert [(kept.origin.what, kept.plan.batch_size) for kept in entries] == [("Net", 1)]
    assert entries[0].path.parent == tmp_path / "autobatch" / "plans"


def test_keys_are_the_same_in_every_process() -> None:
    script = "from tests.test_cache_keys import *; print(*(make() for name, make in OTHERS.items()))"
    answers = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1
