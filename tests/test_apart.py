"""A function in a process of its own: its result, its error, its end, and nothing of it here."""

from __future__ import annotations

import os
import time

import psutil
import pytest
import torch
from torch import nn

from autobatch.simulate.apart import Died, TookTooLong, _fresh, each_apart, run_apart, run_each_apart

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


def test_what_it_returns_and_raises_comes_back() -> None:
    assert run_each_apart([lambda: os.getpid(), lambda: "text"])[1] == "text"
    assert run_apart(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        run_apart(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (os.abort, "the process was ended by signal SIGABRT"),
        (lambda: os._exit(3), "the process ended with exit code 3"),
        (lambda: os.kill(os.getpid(), 9), "the process was ended by signal SIGKILL"),
    ],
)
def test_how_it_ended_is_told(ending: object, text: str) -> None:
    with pytest.raises(Died, match=text):
        run_apart(ending)  # type: ignore[arg-type]


def test_it_is_stopped_when_its_time_is_up() -> None:
    with pytest.raises(TookTooLong):
        run_each_apart([lambda: time.sleep(1000), lambda: None], seconds=0.2)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # nobody is left


def test_what_was_ready_in_time_is_there_however_late_it_is_asked_for() -> None:
    with each_apart([lambda: "x" * 2**20, os.getpid], seconds=2.0) as results:
        time.sleep(2.5)
        text, process = results()
    assert (len(text), process != os.getpid()) == (2**20, True)


def test_what_nobody_asked_for_is_stopped_with_the_caller() -> None:
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(KeyError), each_apart([lambda: time.sleep(1000)]):
        (child,) = [child for child in psutil.Process().children() if child.pid not in before]
        assert child.is_running()
        raise KeyError
    assert not child.is_running()


def test_an_error_that_cannot_be_sent_comes_as_its_text() -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    def odd() -> None:
        raise Odd(1, 2)

    with pytest.raises(RuntimeError, match="^Odd: 1 and 2$"):
        run_apart(odd)


def test_real_arithmetic_after_the_parent_used_its_threads() -> None:
    matrix = torch.randn(600, 600)
    (matrix @ matrix).sum()
    assert run_apart(lambda: float((matrix @ matrix).sum())) == pytest.approx(float((matrix @ matrix).sum()), rel=1e-3)


def test_a_fresh_process_gets_shapes_or_values() -> None:
    model = nn.Linear(100, 100)
    assert _fresh(lambda: (model.weight.device.type, tuple(model.weight.shape)), None, True) == ("meta", (100, 100))
    assert _fresh(lambda: float(model.weight.detach().sum()), None, False) == pytest.approx(float(model.weight.detach().sum()), abs=1e-4)
    with pytest.raises(Died):
        _fresh(os.abort, None, True)
