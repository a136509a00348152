"""The peers, unmodified, each as its own documentation says it is called; none is imported before it is used."""

from __future__ import annotations

import contextlib
import copy
import functools
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers.autovram_trial import run_autovram
from benchmarks.peers.finders import LIMIT, Finder, Work, load

# Where a finder that goes downwards is started, which the user has to choose.
_START = 8192


class _Rows(Dataset[int]):
    """A data set that costs nothing: Lightning makes its batches from it, each a tensor of as many rows."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitems__(self, indices: list[int]) -> list[int]:
        return indices

    def __getitem__(self, index: int) -> int:
        return index


def _lightning(work: Work, scratch: Path, **options: Any) -> int:
    pytorch, tuning = load("lightning.pytorch"), load("lightning.pytorch.tuner")

    class Module(pytorch.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.batch_size = work.module(), 1
            self.automatic_optimization = False

        def train_dataloader(self) -> Any:
            rows = _Rows(work.dataset or 2**24)
            return DataLoader(rows, batch_size=self.batch_size, collate_fn=lambda indices: work.rows(len(indices)))

        def on_train_start(self) -> None:
            work.begin(keeps_state=True)

        def training_step(self, batch: Any) -> None:
            with work.speaking():
                optimizer = self.optimizers()
                self.manual_backward(self.model(batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return work.optimizer(self.model)

    trainer = pytorch.Trainer(
        accelerator=getattr(work, "accelerator", "cpu"),
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=scratch,
    )
    return int(tuning.Tuner(trainer).scale_batch_size(Module(), **options))


def _accelerate(work: Work, _: Path, **options: Any) -> int:
    def train(batch_size: int) -> int:
        work.run(batch_size)
        return batch_size

    try:
        return int(load("accelerate.utils").find_executable_batch_size(train, **options)())
    except RuntimeError as error:
        if "No executable batch size found" in str(error):
            return 0
        raise


def _toma(work: Work, _: Path) -> int:
    def train(batch_size: int) -> int:
        work.run(batch_size)
        return batch_size

    try:
        return int(load("toma").toma.batch(train, initial_batchsize=_START)())
    except torch.OutOfMemoryError:
        return 0  # it lets the error of batch size 1 through


def _batch_finder(work: Work, _: Path) -> int:
    if work.dataset is not None:
        raise NotImplementedError("it makes its own inputs, so that no data set can bound it")

    def get_model() -> torch.nn.Module:
        work.begin()
        return copy.deepcopy(work.module())  # it builds one anew for each attempt

    answer = load("batch_finder").find_max_minibatch(
        get_model, input_shapes=(-1, 1), device=torch.device(getattr(work, "kind", "cpu")), delay=0, use_subprocess=False
    )
    return 0 if answer is None else int(answer[0])


def _probe_batch_size(work: Work, _: Path, **options: Any) -> int:
    def input_fn(size: int) -> dict[str, torch.Tensor]:
        work.begin()
        return {"x": work.rows(size)}

    return int(load("batch_probe").probe_batch_size(work.module(), input_fn, verbose=False, **options))


def _probe(work: Work, _: Path, **options: Any) -> int:
    return int(load("batch_probe").probe(work.run, verbose=False, **options))


def _autotrainer(work: Work, _: Path, **options: Any) -> int:
    return int(load("autotrainer").find_batch_size(work.module(), work.run, **options))


def _kitsune(work: Work, _: Path) -> int:
    spec: Any = getattr(work, "spec")  # noqa: B009 only real work has one
    inputs = spec.sample()[0]
    predict = load("kitsune").predict_memory
    kind = "sgd" if "SGD" in str(spec.optimizer) else "adamw"

    def fits(size: int) -> bool:
        predicted = predict(work.module().body, input_shape=tuple(inputs.shape[1:]), batch_size=size, optimizer=kind)
        return bool(predicted.total_bytes <= spec.limit)

    best, wall = 0, 1
    while fits(wall):
        best, wall = wall, 2 * wall
    while wall - best > 1:
        middle = (best + wall) // 2
        best, wall = (middle, wall) if fits(middle) else (best, middle)
    return best


def _twice(name: str, call: Any, package: str, shipped: dict[str, Any], freed: dict[str, Any], **more: Any) -> list[Finder]:
    """Return a finder with its defaults, and with margin and limits out of the way."""

    def told(options: dict[str, Any]) -> str:
        return ", ".join(f"{key}={value}" for key, value in options.items()) or "defaults"

    both = [(f"{name}, as shipped", shipped, True), (name, {**shipped, **freed}, False)]
    return [
        Finder(name=title, package=package, call=functools.partial(call, **options), options=told(options), shipped=as_is, **more)
        for title, options, as_is in both
    ]


PEERS = (
    *_twice(
        "Lightning power",
        _lightning,
        "lightning",
        {"mode": "power"},
        {"max_val": LIMIT, "max_trials": 100},
        given="model",
        module="lightning",
    ),
    *_twice(
        "Lightning binsearch",
        _lightning,
        "lightning",
        {"mode": "binsearch"},
        {"margin": 0.0, "max_val": LIMIT, "max_trials": 100},
        given="model",
        module="lightning",
    ),
    *_twice("accelerate", _accelerate, "accelerate", {}, {"starting_batch_size": _START}, module="accelerate"),
    Finder(name="toma", package="toma", call=_toma, options=f"initial_batchsize={_START} (it has no default)", module="toma"),
    Finder(
        name="batch-finder",
        package="batch-finder",
        call=_batch_finder,
        options="delay=0, use_subprocess=False",
        given="model",
        reads=True,
        module="batch_finder",
    ),
    *_twice(
        "batch-probe",
        _probe_batch_size,
        "batch-probe",
        {},
        {"headroom": 0.0, "high": LIMIT},
        given="model",
        module="batch_probe",
    ),
    *_twice("batch-probe.probe", _probe, "batch-probe", {}, {"headroom": 0.0, "high": LIMIT}, module="batch_probe"),
    *_twice("autovram", run_autovram, "autovram", {}, {"max_trials": 100}, module="autovram", models=1),
    *_twice("autotrainer", _autotrainer, "autotrainer", {}, {"max_bs": LIMIT}, module="autotrainer"),
    Finder(
        name="torch-kitsune",
        package="torch-kitsune",
        call=_kitsune,
        options="estimate; the largest size it predicts to need at most the limit",
        given="model",
        on=("real",),
        module="kitsune",
    ),
)


def silent() -> contextlib.AbstractContextManager[Any]:
    """Return a context that keeps what peers print and warn from the results."""
    import logging
    import os
    import warnings

    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    return contextlib.redirect_stdout(open(os.devnull, "w"))
