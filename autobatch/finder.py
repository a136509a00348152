"""What users call: ``find`` for a PyTorch model, ``search`` for anything that raises when its batch is too large."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from autobatch.core.errors import NoBatchSizeFits, WorkloadFailed
from autobatch.core.options import PlanRequest, SearchOptions
from autobatch.core.plan import BatchPlan
from autobatch.core.records import Probe
from autobatch.core.search import Search
from autobatch.loop import Progress, Run

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


def find(
    model: nn.Module,
    sample: Any = None,
    *,
    loss_fn: Callable[..., Tensor] | None = None,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None = None,
    step: Callable[[nn.Module, Any], Tensor] | None = None,
    make_batch: Callable[[int], Any] | None = None,
    mode: str = "train",
    precision: str | None = None,
    device: Any = None,
    memory_budget: int | float | str | None = None,
    margin: float = 0.05,
    min_batch_size: int = 1,
    max_batch_size: int | None = None,
    multiple_of: int = 1,
    tolerance: float = 0.01,
    steps: int = 3,
    time_limit: float | None = None,
    objective: str = "memory",
    fast_enough: float = 0.97,
    base_lr: float | None = None,
    base_batch_size: int = 256,
    lr_rule: str | Callable[[float, int, int], float] = "linear",
    noise_scale: float | None = None,
    global_batch_size: int | None = None,
    dataset_size: int | None = None,
    epochs: int | None = None,
    drop_last: bool = False,
    isolate: bool | None = None,
    probe_timeout: float = 600.0,
    cache: bool | str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> BatchPlan:
    """Return the plan for the largest batch size that provably fits, the model left bit for bit as it was.

    Each size tried runs ``steps`` full training steps on the device while its allocator is held to the budget less the margin; the
    answer has itself been run, twice, the second time longer. Sizes are rows in dimension 0 of the sample's tensors.

    Args:
        model: the module to train; moved to ``device`` for the trials and back.
        sample: a batch as the training loop gets it (any nest of tensors), a ``Dataset`` or a ``DataLoader``.
        loss_fn: ``loss_fn(model(inputs), target)``; without it the output's ``.loss``, else the sum of the outputs, and the plan says so.
        optimizer: an instance, or ``params -> Optimizer``; without it only forward and backward are measured, and the plan says so.
        step: ``step(model, batch) -> loss``, in place of forward and loss.
        make_batch: ``make_batch(n)`` returns a batch of ``n`` rows, where repeating the sample's rows will not do.
        mode: ``"train"``, or ``"eval"`` for forward passes without gradients.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``: autocast, with a gradient scaler for fp16.
        device: torch's name of it; by default the current GPU, else the CPU.
        memory_budget: bytes, ``"20GiB"``, or a fraction of the device; by default what the device can give this process now.
        margin: fraction of the budget kept free during every trial.
        min_batch_size, max_batch_size, multiple_of: the batch sizes that may be returned.
        tolerance: relative distance to the true maximum at which the search may stop; 0 for exact.
        steps: training steps of the trial that confirms the answer, 3 at the least; the others run one less, and 2 at the least.
        time_limit: seconds for the whole search; the best size proven by then is confirmed and returned. A worker is stopped in the
            middle of a trial, in this process a trial that has begun is finished.
        objective: ``"memory"`` for the largest, ``"throughput"`` for the smallest that is fast enough.
        fast_enough: which share of the best measured samples per second that is.
        base_lr, base_batch_size: a learning rate and the global batch size it was tuned at; by default the optimizer's own.
        lr_rule: ``"linear"``, ``"sqrt"``, ``"none"``, ``"auto"`` (by the optimizer's class), ``"noise"``, ``"sqrt-saturating"`` or
            ``"surge"`` (with a noise scale), or ``rule(base_lr, global_batch_size, base_batch_size) -> lr``.
        noise_scale: the gradient noise scale in rows, for the rules that need it.
        global_batch_size: rows one optimizer step should see; gives the accumulation steps.
        dataset_size, epochs: for steps per epoch and in all; the batch never exceeds the data set.
        drop_last: whether the loader (and a distributed sampler) leaves out what does not fill a batch (or share out equally).
        isolate: run the trials in a worker process: nothing a trial does can reach this one. By default on the CPU only, where the
            limit on memory would hold for every thread of this process.
        probe_timeout: seconds one probe may take in a worker.
        cache: ``True`` keeps plans in the user's cache directory, a path in that folder; where model, sample, options, device and versions
            are the same and the memory can still be had, the plan that is kept is returned and nothing is run. Its last note says so.
        progress: called with the ``Setting``, then a ``Trying`` before and a ``Probe`` after every trial.

    Raises:
        InvalidRequest: an argument cannot be meant.
        DeviceUnavailable: no such device, or one that cannot be held to a limit.
        NoBatchSizeFits: the smallest permitted size does not fit.
        WorkloadFailed: the loss cannot be trained on, or the user's code raised in a worker what cannot be sent back.
        WorkerFailed: the worker died or hung.
        Exception: whatever the user's code raises, as it is, with the batch size noted on it.
    """
    options = SearchOptions(
        min_batch_size=min_batch_size,
        max_batch_size=max_batch_size,
        multiple_of=multiple_of,
        tolerance=tolerance,
        steps=steps,
        time_limit=time_limit,
    )
    request = PlanRequest(
        base_lr=base_lr,
        base_batch_size=base_batch_size,
        lr_rule=lr_rule,
        noise_scale=noise_scale,
        global_batch_size=global_batch_size,
        dataset_size=dataset_size,
        epochs=epochs,
        drop_last=drop_last,
        objective=objective,
        fast_enough=fast_enough,
    )
    what = {
        "model": model,
        "sample": sample,
        "loss_fn": loss_fn,
        "optimizer": optimizer,
        "step": step,
        "make_batch": make_batch,
        "mode": mode,
        "precision": precision,
    }
    where = {"device": device, "memory_budget": memory_budget, "margin": margin}
    from autobatch.probe.opening import open_prober

    def measure() -> BatchPlan:
        with open_prober(what, where, isolate=isolate, probe_timeout=probe_timeout, time_limit=time_limit) as prober:
            return Run(prober, request, options, progress).plan()

    try:
        if cache is None or cache is False:
            return measure()
        from autobatch.cache.recall import question_of_step, recall
        from autobatch.cache.store import PlanCache

        rest = {"request": request, "options": options, "isolate": isolate, "probe_timeout": probe_timeout}
        question, what["sample"] = question_of_step(what, where, rest)
        return recall(PlanCache(None if cache is True else cache), question, measure)
    except WorkloadFailed as failed:
        if failed.original is None:
            raise
        raise failed.original from WorkloadFailed(f"in the worker:\n\n{failed.traceback_text}")


def search(
    run: Callable[[int], object],
    *,
    min_batch_size: int = 1,
    max_batch_size: int | None = None,
    multiple_of: int = 1,
    tolerance: float = 0.01,
    time_limit: float | None = None,
    progress: Callable[[Probe], object] | None = None,
) -> int:
    """Return the largest batch size for which ``run(batch_size)`` does not run out of memory: the loop for any framework.

    It goes by errors alone, without a limit or readings of its own. The size returned has itself been run.

    Args:
        run: a training step on a batch of that many rows; raises when it does not fit.
        min_batch_size, max_batch_size, multiple_of: the batch sizes that may be tried.
        tolerance: relative distance to the true maximum at which the search may stop; 0 for exact.
        time_limit: seconds; the best size by then is returned.
        progress: called with a ``Probe`` after every run.

    Raises:
        InvalidRequest: an argument cannot be meant.
        NoBatchSizeFits: the smallest permitted size runs out of memory.
        Exception: whatever ``run`` raises that is not about memory, as it is.
    """
    options = SearchOptions(
        min_batch_size=min_batch_size,
        max_batch_size=max_batch_size,
        multiple_of=multiple_of,
        tolerance=tolerance,
        time_limit=time_limit,
    )
    from autobatch.probe.attempt import attempt

    going = Search(options.space(PlanRequest()))
    deadline = time.monotonic() + (time_limit or float("inf"))
    while (size := going.ask()) is not None and (going.best is None or time.monotonic() <= deadline):
        probe = attempt(run, size)
        going.tell(size, probe.outcome.fits)
        if progress is not None:
            progress(probe)
    if going.best is None:
        raise NoBatchSizeFits(
            f"Not even batch size {going.wall} fits: {probe.message}. Next: look for what else holds memory (nvidia-smi), shrink the "
            "rows, or use a smaller model.",
            batch_size=going.wall or 0,
            needed=None,
            available=None,
        )
    return going.best
