"""What a model may hold, a row each: the thing itself, how a step changes it, and how its user would look at it."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autobatch.workload.randomness import keep_random_state
from autobatch.workload.state import Snapshot

CPU = torch.device("cpu")


class Rows(torch.utils.data.Dataset[int]):
    """A data set that augments its rows, and counts what it read."""

    def __init__(self) -> None:
        self.dice, self.read = random.Random(5), 0


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def up(self) -> None:
        self.count += 1


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(Scripted())


def assigned_later() -> tuple[Callable[[], None], Callable[[], str]]:
    def assign() -> None:
        nonlocal value
        value = "assigned"

    def look() -> str:
        try:
            return value
        except NameError:
            return "not assigned"

    if False:
        value = ""
    return assign, look


def compressed(layout: torch.layout, blocks: tuple[int, int] | None = None) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.eye(4).to_sparse(layout=layout, blocksize=blocks)


def memory_in_use() -> tuple[bytearray, Tensor]:
    raw = bytearray(b"abcd")
    return raw, torch.frombuffer(raw, dtype=torch.uint8)


def lock(array: Any) -> None:
    array += 1
    array.flags.writeable = False


def train_scripted(module: Any) -> None:
    module(torch.randn(4, 2)).sum().backward()
    module.norm.eval()


def hook_for_a_moment(tensor: Tensor) -> None:
    tensor.register_hook(lambda gradient: gradient).remove()


def numbers(tensor: Tensor) -> Any:
    return tensor.to_dense().tolist()


def listed(module: nn.Module) -> Any:
    return [part.training for part in module.modules()], {name: value.tolist() for name, value in module.state_dict().items()}


def scale_values(tensor: Tensor) -> None:
    tensor.values().mul_(7)


# name: what is held, what a step does to it, what its user sees
THINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object], Callable[[Any], Any]]] = {
    "compressed rows": (lambda: compressed(torch.sparse_csr), scale_values, numbers),
    "compressed columns": (lambda: compressed(torch.sparse_csc), scale_values, numbers),
    "blocks in rows": (lambda: compressed(torch.sparse_bsr, (2, 2)), scale_values, numbers),
    "blocks in columns": (lambda: compressed(torch.sparse_bsc, (2, 2)), scale_values, numbers),
    "oneDNN's own": (lambda: torch.ones(4).to_mkldnn(), lambda t: t.copy_(torch.zeros(4).to_mkldnn()), numbers),
    "a hook for a moment": (lambda: torch.ones(1, requires_grad=True), hook_for_a_moment, lambda t: t._backward_hooks),
    "a set": (lambda: {"a", "b"}, lambda s: (s.remove("a"), s.add("c")), sorted),
    "tensors in a tuple": (lambda: (torch.ones(1), [1]), lambda t: (t[0].add_(1), t[1].append(2)), repr),
    "a bytearray": (lambda: bytearray(b"ab"), lambda b: b.extend(b"c"), bytes),
    "a bytearray whose memory a tensor has": (memory_in_use, lambda pair: pair[1].add_(1), lambda pair: bytes(pair[0])),
    "an array that is locked": (lambda: np.zeros(2), lock, lambda a: (a.tolist(), a.flags.writeable)),
    "a partial": (lambda: functools.partial(torch.add, other=torch.ones(1)), lambda p: p.keywords["other"].add_(1), repr),
    "a bound method": (lambda: Counter().up, lambda up: up(), lambda up: up.__self__.count),
    "a variable assigned later": (assigned_later, lambda pair: pair[0](), lambda pair: pair[1]()),
    "a data set's generator": (Rows, lambda rows: rows.dice.random(), lambda rows: rows.dice.getstate()),
    "NumPy's bits": (lambda: np.random.PCG64(1), lambda bits: bits.random_raw(), lambda bits: repr(bits.state)),
    "a scripted module": (scripted, train_scripted, listed),
    "a lazy module": (lambda: [nn.LazyLinear(2)], lambda m: m[0](torch.ones(1, 3)), lambda m: (type(m[0]), is_lazy(m[0].weight))),
}


@pytest.mark.parametrize("name", THINGS)
def test_what_a_model_holds_is_put_back(name: str) -> None:
    make, change, look = THINGS[name]
    model = nn.Linear(1, 1)
    held = make()
    object.__setattr__(model, "held", held)
    before = look(held)
    snapshot = Snapshot(model, None, CPU)
    change(held)
    assert look(held) != before
    snapshot.restore()
    assert model.held is held
    assert look(held) == before


def test_rows_that_a_data_set_read_stay_read() -> None:
    model = nn.Linear(1, 1)
    model.rows = Rows()
    snapshot = Snapshot(model, None, CPU)
    model.rows.read += 1
    snapshot.restore()
    assert model.rows.read == 1


def test_what_cannot_be_put_back_is_told_after_the_rest_was() -> None:
    class Log(list[str]):
        def clear(self) -> None:
            raise TypeError("a log is only written to")

    model = nn.Linear(2, 2)
    before = model.weight.tolist()
    model.log, model.calls = Log(), {"steps": 0}
    snapshot = Snapshot(model, None, CPU)
    model.log.append("step")
    model.calls["steps"] += 1
    model.weight.data.add_(1)
    model.eval()
    with pytest.raises(TypeError, match="a log is only written to"):
        snapshot.restore()
    assert (model.weight.tolist(), model.calls, model.training, model.log) == (before, {"steps": 0}, True, ["step"])


def in_a_function(generator: Any) -> Any:
    def collate(rows: Any, dice: Any = generator) -> Any:
        return generator, unset

    if False:
        unset = None
    return collate


class Sampler:
    def __init__(self, generator: Any) -> None:
        self.generators = {"rows": (generator,)}

    def draw(self) -> None:
        """A bound method holds what its object holds."""


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda generator: generator,
    "a set": lambda generator: {generator},
    "a list of dicts": lambda generator: [{"dice": generator}],
    "an object": Sampler,
    "a bound method": lambda generator: Sampler(generator).draw,
    "a function": in_a_function,
    "a partial": lambda generator: functools.partial(max, key=generator),
}
GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch.Generator": (torch.Generator, lambda one: float(torch.rand((), generator=one))),
    "random.Random": (lambda: random.Random(1), lambda one: one.random()),
    "numpy.random.Generator": (lambda: np.random.default_rng(1), lambda one: one.random()),
    "numpy.random.RandomState": (lambda: np.random.RandomState(1), lambda one: one.rand()),
    "numpy.random.BitGenerator": (lambda: np.random.MT19937(1), lambda one: one.random_raw()),
}


def kept(holder: Any, draw: Callable[[], Any]) -> Iterator[Any]:
    with keep_random_state(holder):
        yield draw()
    yield draw()


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("place", HOLDERS)
def test_a_generator_draws_the_same_again_wherever_it_is_held(kind: str, place: str) -> None:
    make, draw = GENERATORS[kind]
    generator = make()
    first, again = kept(HOLDERS[place](generator), lambda: draw(generator))
    assert first == again


def test_a_long_list_is_data_and_holds_no_generator_that_is_put_back() -> None:
    generator = random.Random(1)
    first, again = kept([generator] * 10_001, generator.random)
    assert first != again


def test_numbers_of_the_system_cannot_be_drawn_again() -> None:
    generator = random.SystemRandom()
    first, again = kept(generator, generator.random)
    assert first != again
