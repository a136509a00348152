"""TARGET on the command line: code the user chose to run, turned into the arguments of ``find``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from autobatch.core.errors import InvalidRequest, WorkloadFailed
from autobatch.workload.workload import Workload, build_workload

STEP_OPTIONS = ("model", "sample", "loss_fn", "optimizer", "step", "make_batch", "mode", "precision")
PLAN_OPTIONS = ("base_lr", "base_batch_size", "lr_rule", "global_batch_size", "dataset_size", "epochs", "objective")
SEARCH_OPTIONS = ("min_batch_size", "max_batch_size", "multiple_of", "tolerance", "steps")

_FORMS = "path/to/train.py:build, package.module:build, timm:NAME, torchvision:NAME, hf:NAME or example:NAME"
_RETURNS = "a Workload, a (model, sample) pair or a dict of find's arguments"


def load_target(target: str, overrides: Mapping[str, Any]) -> tuple[Workload, dict[str, Any]]:
    """Return the workload that ``target`` names and the plan options it brings along.

    ``overrides`` (mode, precision, optimizer by name, base_lr) stand above what the target says.

    Raises:
        InvalidRequest: there is no such file, module, function or model.
        WorkloadFailed: the user's code raised, or returned something else than a workload.
    """
    prefix, _, name = target.partition(":")
    library = _LIBRARIES.get(prefix)
    arguments = library(name) if library is not None else _call(_find_function(target), target)
    if isinstance(arguments, Workload):
        return arguments, {}
    arguments.update({key: value for key, value in overrides.items() if key in STEP_OPTIONS and value is not None})
    if isinstance(arguments.get("optimizer"), str):
        arguments["optimizer"] = _optimizer(arguments["optimizer"], overrides.get("base_lr") or arguments.get("base_lr"))
    steps = {key: arguments.pop(key) for key in STEP_OPTIONS if key in arguments}
    return build_workload(**steps), arguments


def _find_function(target: str) -> Callable[[], Any]:
    place, _, attribute = target.rpartition(":")
    if not place:
        raise InvalidRequest(f"TARGET {target!r} names no function. Write {_FORMS}.")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_")) or "none"
        raise InvalidRequest(f"{place} has no function {attribute!r} (its functions: {known}). Write TARGET as {place}:FUNCTION.")
    return function  # type: ignore[no-any-return]


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InvalidRequest(f"There is no file {str(path)!r} (looked in {Path.cwd()}). Check the path in TARGET.")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # classes defined in the file must be importable by name, for data loader workers
    spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise  # the module is there; something it imports is not
        raise InvalidRequest(
            f"There is no module {name!r} here (looked in {Path.cwd()} and the installed packages). Write {_FORMS}."
        ) from None


def _call(function: Callable[[], Any], target: str) -> Any:
    """Return what the user's function gives, as a workload or a fresh dict of arguments."""
    result = function()
    if isinstance(result, Workload):
        return result
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module):
        return {"model": result[0], "sample": result[1]}
    if isinstance(result, Mapping) and "model" in result:
        unknown = sorted(set(result) - {*STEP_OPTIONS, *PLAN_OPTIONS, *SEARCH_OPTIONS})
        if unknown:
            raise WorkloadFailed(
                f"{target} returned options that find does not have: {', '.join(map(str, unknown))}. "
                f"Known: {', '.join((*STEP_OPTIONS, *PLAN_OPTIONS, *SEARCH_OPTIONS))}."
            )
        if callable(result.get("lr_rule")):
            raise WorkloadFailed(
                f"{target} returned a function as lr_rule, which the worker cannot hand over. Name a rule (linear, sqrt, none, auto), or "
                "pass the function to autobatch.find(…, lr_rule=…)."
            )
        return dict(result)
    raise WorkloadFailed(f"{target} returned a {type(result).__name__}; wanted is {_RETURNS}.")


def _optimizer(name: str, lr: float | None) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None:
    if name.lower() == "none":
        return None
    kinds = {key.lower(): kind for key, kind in vars(torch.optim).items() if isinstance(kind, type) and key != "Optimizer"}
    if name.lower() not in kinds:
        raise InvalidRequest(f"There is no optimizer {name!r} in torch.optim. Known: none, {', '.join(sorted(kinds))}.")
    kind, options = kinds[name.lower()], {} if lr is None else {"lr": lr}
    return lambda parameters: kind(parameters, **options)


def _need(module: str, target: str) -> ModuleType:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise InvalidRequest(f"{target} needs the package {package!r}, which is not installed. Type: pip install {package}") from None


def _example(name: str) -> dict[str, Any]:
    folder = Path(__file__).parents[1] / "examples"
    known = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    if name not in known:
        raise InvalidRequest(f"There is no example {name!r}. Known: {', '.join(known)}.")
    return dict(importlib.import_module(f"autobatch.examples.{name}").build())


def _images(model: nn.Module, size: tuple[int, ...], classes: int = 1000) -> dict[str, Any]:
    """Return the arguments of an image classifier trained with cross-entropy on random images of ``size`` (channels, height, width)."""
    sample = (torch.randn(2, *size), torch.randint(classes, (2,)))
    return {"model": model, "sample": sample, "loss_fn": nn.functional.cross_entropy, "optimizer": "sgd", "base_lr": 0.1}


def _timm(name: str) -> dict[str, Any]:
    timm = _need("timm", f"timm:{name}")
    if name not in timm.list_models():
        raise InvalidRequest(f"timm has no model {name!r}. Type: python -c \"import timm; print(timm.list_models('*{name[:5]}*'))\"")
    model = timm.create_model(name, pretrained=False)
    return _images(model, tuple(model.default_cfg["input_size"]))


def _torchvision(name: str) -> dict[str, Any]:
    models = _need("torchvision.models", f"torchvision:{name}")
    if name not in models.list_models(module=models):
        raise InvalidRequest(f"torchvision has no classification model {name!r}. Known: {', '.join(models.list_models(module=models))}.")
    return _images(models.get_model(name, weights=None), (3, 299, 299) if name == "inception_v3" else (3, 224, 224))


def _huggingface(name: str) -> dict[str, Any]:
    """Return the arguments of a language model with random weights; nothing is downloaded."""
    transformers = _need("transformers", f"hf:{name}")
    try:
        config = transformers.AutoConfig.for_model(name)
        kind = (
            transformers.AutoModelForCausalLM
            if not name.startswith(("bert", "roberta", "distilbert"))
            else transformers.AutoModelForMaskedLM
        )
        model = kind.from_config(config)
    except (ValueError, KeyError) as error:
        raise InvalidRequest(
            f"transformers knows no language model type {name!r} ({error}). Write the type, for example hf:gpt2 or hf:bert, "
            "or a function of your own: train.py:build."
        ) from None
    length = min(getattr(config, "max_position_embeddings", 1024), 1024)
    tokens = torch.randint(config.vocab_size, (2, length))
    return {"model": model, "sample": {"input_ids": tokens, "labels": tokens}, "optimizer": "adamw", "base_lr": 1e-4}


_LIBRARIES: dict[str, Callable[[str], dict[str, Any]]] = {
    "example": _example,
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _huggingface,
}
