"""Training steps with real memory under a real limit, the same for every finder: each trial is held to it anew.

On a processor the limit is ``RLIMIT_AS``, on a card the caching allocator's fraction, both set as autobatch's devices set them: counted in
bytes of tensors, over what the process held before its first trial.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import autobatch
from autobatch.devices import open_device
from autobatch.devices.forget import first_line
from autobatch.workload.batches import take_sample, to_device
from autobatch.workload.state import resident_bytes
from benchmarks.peers.ledger import Ledger, Trial
from benchmarks.peers.models import Model

# What the user's training function runs in one trial.
STEPS = 3


class Carrier(nn.Module):
    """A model and its loss in one, called with a tensor of as many rows as the batch is to have."""

    def __init__(self, work: RealWork, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self._work = work

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the loss of a batch of ``len(x)`` rows."""
        return {"loss": self._work.loss(len(x), self.body)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Carrier:
        return Carrier(self._work, copy.deepcopy(self.body, memo))


class RealWork:
    """One model on one device under its limit, and the ledger of what was run.

    Attributes:
        model: the user's model, which a finder may be given.
    """

    dataset: int | None = None

    def __init__(self, spec: Model) -> None:
        self.spec, self.ledger = spec, Ledger()
        self.device = open_device(spec.device)
        torch.manual_seed(0)
        self.model = spec.build().to(spec.device).train()
        self._sample = take_sample(spec.sample())
        self._trial, self._capped = contextlib.ExitStack(), False
        self._inputs = self._target = self._output = None
        self.kind = self.accelerator = spec.device.partition(":")[0]

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Hold the device as a search does; the limit itself is set by each trial."""
        hooks = (
            register_optimizer_step_pre_hook(lambda *_: self.ledger.optimizer_begins()),
            register_optimizer_step_post_hook(lambda *_: self.ledger.passes_done() if self.ledger.trials else None),
        )
        try:
            with self.device.session():
                gc.collect()
                self.device.release()
                yield
        finally:
            self.end()
            for hook in hooks:
                hook.remove()

    def begin(self, *, keeps_state: bool = False) -> None:  # noqa: ARG002 here memory keeps what is kept
        """Begin a trial: hold what follows to the limit."""
        self.end()
        self._inputs = self._target = self._output = None
        self.ledger.open()
        self.device.release()
        self._trial.enter_context(self.device.cap(self.spec.limit, resident_bytes(self.model, None)))
        self._capped = True

    def end(self) -> None:
        """Lift the limit."""
        self._trial.close()
        self._capped = False

    def loss(self, size: int, model: nn.Module) -> Tensor:
        """Return the loss of a batch of ``size`` rows; running out of memory says so as on a card."""
        if not self._capped:
            self.begin()
        self.ledger.begin(size, size)
        self.device.reset_peaks()
        with self.speaking():
            # As the variables of a plain loop: each lives until it is assigned again.
            self._inputs, self._target = to_device(self._sample.grow(size), torch.device(self.spec.device))
            dtype = {"bf16": torch.bfloat16}.get(self.spec.precision or "")
            with torch.autocast(self.kind, dtype=dtype, enabled=dtype is not None):
                self._output = model(self._inputs)
                loss = self.spec.loss(self._output, self._target)
        if loss.requires_grad:
            loss.register_hook(self._when_backward_ends)  # type: ignore[no-untyped-call]
        return loss

    def run(self, size: int, steps: int = STEPS) -> None:
        """Train ``steps`` steps on ``size`` rows with a new optimizer: what a finder is given that wants a function."""
        self.begin()
        with self.speaking():
            optimizer = self.spec.optimizer(self.model.parameters())
            for _ in range(steps):
                loss = self.loss(size, self.model)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                self.model.zero_grad(set_to_none=True)

    def module(self) -> nn.Module:
        """Return the user's model and its loss in one."""
        return Carrier(self, self.model)

    def rows(self, size: int) -> Tensor:
        """Return what stands for a batch of ``size`` rows; the batch itself is made within the step."""
        return torch.zeros(1, 1, device=self.spec.device).expand(size, 1)

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Return a new optimizer of the user's kind."""
        return self.spec.optimizer(module.parameters())

    def own_way(self, *, expecting: bool = False, isolate: bool | None = None) -> int:  # noqa: ARG002 on a card find expects by itself
        """Return the answer of ``autobatch.find`` with its defaults, without a margin; its worker's trials go into the ledger."""
        spec = self.spec
        plan = autobatch.find(
            self.model,
            self._sample.value,
            loss_fn=spec.loss,
            optimizer=spec.optimizer,
            precision=spec.precision,
            device=spec.device,
            memory_budget=spec.limit,
            margin=0.0,
            isolate=isolate,
        )
        self.ledger.trials.clear()  # where it ran in this process
        for probe in plan.probes:
            begun = probe.steps + (not probe.outcome.fits)
            self.ledger.trials.append(Trial(probe.batch_size, rows=begun * probe.batch_size, begun=begun, done=probe.steps))
        return plan.batch_size

    @contextlib.contextmanager
    def speaking(self) -> Iterator[None]:
        """Let any error about memory read as CUDA's, the only one that every finder knows; and free what the broken step held."""
        said = ""
        try:
            yield
        except Exception as error:
            if self.device.classify(error, ran_before=True) is None:
                raise
            said = first_line(error)
        if said:
            self.model.zero_grad(set_to_none=True)
            self._inputs = self._target = self._output = None
            raise torch.OutOfMemoryError(said if "CUDA out of memory" in said else f"CUDA out of memory. ({said})")

    def _when_backward_ends(self, gradient: Tensor) -> Tensor:
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(self.ledger.passes_done)
        return gradient


def lasts(work: RealWork, size: int, steps: int) -> bool:
    """Whether ``steps`` training steps of ``size`` rows run through, in a fork: every size finds the memory that the first one finds."""
    child = os.fork() if work.kind == "cpu" else None
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    fits = True
    try:
        work.run(size, steps)
    except torch.OutOfMemoryError:
        fits = False
    if child == 0:
        os._exit(0 if fits else 1)
    return fits


def largest(work: RealWork, steps: int) -> int:
    """Return the largest size that lasts ``steps`` steps, to a quarter of a percent.

    Doubled and bisected with as many steps as a trial has, then downwards until one lasts.
    """
    best, top = 0, 1
    while lasts(work, top, STEPS):
        best, top = top, 2 * top
    while top - best > 1:
        middle = (best + top) // 2
        best, top = (middle, top) if lasts(work, middle, STEPS) else (best, middle)
    while best and not lasts(work, best, steps):
        best -= max(1, best // 400)
    return best
