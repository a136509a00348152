from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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


LIBRARIES = {
    "timm.py": """
import torch
def list_models(): return ["tiny", "tiny_wide"]
def create_model(name, pretrained):
    assert not pretrained
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 1000))
    model.default_cfg = {"input_size": (3, 8, 8)}
    return model
""",
    "torchvision/__init__.py": "",
    "torchvision/models.py": """
import sys, torch
def list_models(module): return ["inception_v3", "tiny"] if module is sys.modules[__name__] else []
def get_model(name, weights):
    assert weights is None
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 1000))
""",
    "transformers.py": """
import torch
class Config:
    vocab_size = 50
class Short(Config):
    max_position_embeddings = 16
class AutoConfig:
    @staticmethod
    def for_model(name):
        if name == "odd":
            raise ValueError("Unrecognized model identifier: odd")
        return {"gpt2": Config, "bert": Short}[name]()
class Model(torch.nn.Embedding):
    def forward(self, input_ids, labels):
        return {"loss": super().forward(input_ids).sum()}
class AutoModelForCausalLM:
    causal = True
    @classmethod
    def from_config(cls, config):
        model = Model(config.vocab_size, 2)
        model.causal = cls.causal
        return model
class AutoModelForMaskedLM(AutoModelForCausalLM):
    causal = False
""",
}


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Small packages with the names and the functions of those that models come from."""
    for name, text in LIBRARIES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("timm", "torchvision", "torchvision.models", "transformers")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("target", "shape"),
    [("timm:tiny", (4, 3, 8, 8)), ("torchvision:tiny", (4, 3, 224, 224)), ("torchvision:inception_v3", (4, 3, 299, 299))],
)
def test_an_image_model_of_a_library_is_trained_on_images_of_its_size(libraries: Path, target: str, shape: tuple[int, ...]) -> None:
    workload, defaults = load_target(target, {"base_lr": 0.2})
    images, labels = workload.make_batch(4)
    assert (images.shape, labels.shape, labels.dtype) == (shape, (4,), torch.int64)
    loss, output = workload.loss(workload.model, (images, labels))
    assert (output.shape, loss is not None and loss.isfinite().item()) == ((4, 1000), True)
    assert (type(workload.optimizer).__name__, workload.group_lrs, defaults) == ("SGD", (0.2,), {"base_lr": 0.1})


@pytest.mark.parametrize(("target", "tokens", "causal"), [("hf:gpt2", (3, 1024), True), ("hf:bert", (3, 16), False)])
def test_a_language_model_is_trained_on_tokens_of_its_length(libraries: Path, target: str, tokens: tuple[int, int], causal: bool) -> None:
    workload, defaults = load_target(target, {})
    batch = workload.make_batch(3)
    assert {name: tuple(part.shape) for name, part in batch.items()} == {"input_ids": tokens, "labels": tokens}
    assert int(batch["input_ids"].max()) < 50
    assert (workload.model.causal, type(workload.optimizer).__name__, defaults) == (causal, "AdamW", {"base_lr": 1e-4})
    assert workload.loss(workload.model, batch)[0] is not None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("timm:tinny_model", r"timm has no model 'tinny_model'. Type: python -c .*list_models\('\*tinny\*'\)"),
        ("torchvision:nope", "torchvision has no classification model 'nope'. Known: inception_v3, tiny."),
        ("hf:odd", r"transformers knows no language model type 'odd' \(Unrecognized .* Write the type, for example hf:gpt2 or hf:bert"),
    ],
)
def test_a_model_that_a_library_does_not_have(libraries: Path, target: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        load_target(target, {})


def test_a_library_that_lacks_a_part_of_its_own_is_no_library_that_is_missing(libraries: Path) -> None:
    (libraries / "timm.py").write_text("import a_package_that_is_not_there")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        load_target("timm:tiny", {})


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
