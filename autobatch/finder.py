"""The one loop: ask the search for a size, probe it, tell the search; then confirm the answer and plan with it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from autobatch.core.errors import InvalidRequest, NoBatchSizeFits, WorkloadFailed
from autobatch.core.memory_model import MemoryModel
from autobatch.core.plan import BatchPlan, make_plan, micro_batch
from autobatch.core.records import DEFAULT_MAX_BATCH_SIZE, Outcome, PlanRequest, Probe, SearchSpace, Setting, Trying, with_defaults
from autobatch.core.search import Ending, Search
from autobatch.core.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

Progress = Callable[[Setting | Trying | Probe], None]

# A size is worth less memory when it is this close to the fastest one measured.
_FAST_ENOUGH = 0.97
# How torch's batch normalisation says that one value per channel has no variance.
_ONE_ROW = "Expected more than 1 value per channel when training"


class Prober(Protocol):
    """Measures one batch size after another.

    ``probe`` never raises for memory and always raises for a fault in the user's code. ``close`` puts everything back and may be
    called twice.
    """

    setting: Setting

    def probe(self, batch_size: int, *, steps: int = 3, confirm: bool = False) -> Probe:
        """Return what ``steps`` training steps of ``batch_size`` rows did."""

    def close(self) -> None:
        """Put everything back as it was."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How to search, as the user said it; the bounds of the space come from these and from what the plan is for."""

    min_batch_size: int = 1
    max_batch_size: int | None = None
    multiple_of: int = 1
    tolerance: float = 0.01
    steps: int = 3
    time_limit: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 2:
            raise InvalidRequest(f"steps is {self.steps!r}; 2 or more are needed, because optimizer state is resident from the second on.")
        if self.time_limit is not None and not self.time_limit > 0:
            raise InvalidRequest(f"time_limit is {self.time_limit!r}; give seconds above zero, or leave it out.")
        self.space(PlanRequest())

    def with_defaults(self, defaults: Mapping[str, Any]) -> SearchOptions:
        """Return these options with ``defaults`` where they still have their own default value."""
        return with_defaults(self, defaults)

    def space(self, request: PlanRequest) -> SearchSpace:
        """Return the sizes worth trying for ``request``: never more rows than the data set or the global batch has."""
        limits = [self.max_batch_size if self.max_batch_size is not None else max(DEFAULT_MAX_BATCH_SIZE, self.min_batch_size)]
        space = SearchSpace(min=self.min_batch_size, max=limits[0], multiple_of=self.multiple_of, tolerance=self.tolerance)
        limits += [-(-rows // request.world_size) for rows in (request.dataset_size, request.global_batch_size) if rows is not None]
        return dataclasses.replace(space, max=max(min(limits), space.first))


class Run:
    """One search from the first probe to the plan.

    Attributes:
        probes: every probe so far, in order.
    """

    def __init__(self, prober: Prober, request: PlanRequest, options: SearchOptions, progress: Progress | None = None) -> None:
        self._prober, self._options = prober, options.with_defaults(prober.setting.defaults)
        self._progress: Progress = progress or (lambda _: None)
        self._setting = prober.setting
        dataset_size = request.dataset_size or self._setting.defaults.get("dataset_size") or self._setting.dataset_size
        self._request = dataclasses.replace(request.with_defaults(self._setting.defaults), dataset_size=dataset_size)
        self._space = self._options.space(self._request)
        self._model = MemoryModel(self._setting.cap)
        self._search = Search(self._space, self._model)
        self._deadline = None if options.time_limit is None else time.monotonic() + options.time_limit
        self._walls: dict[int, Probe] = {}
        self._notes: list[str] = []
        self.probes: list[Probe] = []

    def plan(self) -> BatchPlan:
        """Return the plan for the largest batch size that was run, confirmed, and fits.

        Raises:
            NoBatchSizeFits: not even the smallest permitted size fits.
        """
        self._progress(self._setting)
        while True:
            self._explore()
            chosen = self._chosen()
            probe = self._probe(chosen, steps=max(5, 2 * self._options.steps), confirm=True)
            if probe.outcome.fits:
                return self._finish(chosen)
            self._search.reject(chosen)

    def _explore(self) -> None:
        """Probe until the search has ended or the time is up."""
        while not (self._out_of_time() and self._search.best is not None):
            size = self._search.ask()
            if size is None:
                break
            try:
                probe = self._probe(size, steps=self._options.steps)
            except (ValueError, WorkloadFailed) as error:
                self._start_at_two(size, error)
                continue
            self._model.observe(probe)
            self._search.tell(size, probe.outcome.fits)
        if self._search.best is None:
            raise self._nothing_fits()

    def _start_at_two(self, size: int, error: Exception) -> None:
        """Begin again at two rows when one row is too few for batch normalisation; raise any other ``error``."""
        if size != 1 or self._space.last < 2 or _ONE_ROW not in str(error):
            raise error
        self._notes.append("batch size 1 was left out: the model's batch normalisation needs at least two rows in training")
        self._space = dataclasses.replace(self._space, min=2)
        self._model = MemoryModel(self._setting.cap)
        self._search = Search(self._space, self._model)

    def _probe(self, size: int, *, steps: int, confirm: bool = False) -> Probe:
        self._progress(Trying(batch_size=size, confirmation=confirm, best=self._search.best, wall=self._search.wall))
        probe = self._prober.probe(size, steps=steps, confirm=confirm)
        self.probes.append(probe)
        if not probe.outcome.fits:
            self._walls[size] = probe
        self._progress(probe)
        return probe

    def _out_of_time(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _chosen(self) -> int:
        """Return the size to confirm: the largest, the fast enough one, or an equal share of the global batch."""
        best = self._search.best
        assert best is not None
        if self._request.global_batch_size is not None:
            share = micro_batch(
                self._request.global_batch_size,
                self._request.world_size,
                best,
                multiple_of=self._space.multiple_of,
                smallest=self._space.first,
            )
            return share.batch_size
        if self._request.objective == "throughput":
            return self._fast_enough(best)
        return best

    def _fast_enough(self, best: int) -> int:
        """Return the smallest size that was run at 97 % or more of the best measured samples per second."""
        rates = {p.batch_size: p.samples_per_second for p in self.probes if p.outcome.fits and p.batch_size <= best}
        measured = {size: rate for size, rate in rates.items() if rate is not None}
        return min((size for size, rate in measured.items() if rate >= _FAST_ENOUGH * max(measured.values())), default=best)

    def _finish(self, chosen: int) -> BatchPlan:
        search = self._search
        best = search.best
        assert best is not None
        return make_plan(
            setting=self._setting,
            request=self._request,
            space=self._space,
            probes=self.probes,
            batch_size=chosen,
            best=best,
            wall=search.wall,
            wall_kind={Ending.PROBED_WALL: "probed", Ending.PREDICTED_WALL: "predicted"}.get(search.ending) if search.ending else None,
            limited_by=self._limited_by(chosen, best),
            exact=search.exact,
            notes=self._notes,
        )

    def _limited_by(self, chosen: int, best: int) -> str:
        request, space = self._request, self._space
        if chosen < best and request.objective == "throughput" and request.global_batch_size is None:
            return "throughput"
        if self._search.ending is None:
            return "time_limit"
        if self._search.ending is Ending.LIMIT:
            if request.global_batch_size is not None and space.max == -(-request.global_batch_size // request.world_size):
                return "global_batch_size"
            if request.dataset_size is not None and space.max == -(-request.dataset_size // request.world_size):
                return "dataset"
            return "max_batch_size"
        wall = self._walls.get(self._search.wall or 0)
        return "kernel_limit" if wall is not None and wall.outcome is Outcome.KERNEL_LIMIT else "memory"

    def _nothing_fits(self) -> NoBatchSizeFits:
        size, setting = self._space.first, self._setting
        failed = self._walls[size]
        needed = failed.peak_allocated
        reading = setting.reading
        holders = ", ".join(f"{other.name or 'a process'} (pid {other.pid}) {format_bytes(other.used or 0)}" for other in reading.others)
        parts = [
            f"Not even batch size {size} fits: a trial may use {format_bytes(setting.cap)} "
            f"(budget {format_bytes(setting.budget)} less the margin of {setting.margin:.0%}) on {setting.device}",
            f"and it needs more than {format_bytes(max(needed or 0, setting.resident))}"
            f" ({format_bytes(setting.resident)} of it parameters and buffers).",
            f"Others hold: {holders}." if holders else "No other process is seen holding the device's memory.",
            f"The trial said: {failed.message}." if failed.message else "",
            "Next: raise --memory-budget (memory_budget=), shorten or shrink the sample, use precision bf16, or a smaller model.",
        ]
        return NoBatchSizeFits(
            " ".join(part for part in parts if part), batch_size=size, needed=needed, available=setting.cap
        )


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
    base_lr: float | None = None,
    base_batch_size: int = 256,
    lr_rule: str | Callable[[float, int, int], float] = "linear",
    global_batch_size: int | None = None,
    dataset_size: int | None = None,
    epochs: int | None = None,
    isolate: bool = False,
    probe_timeout: float = 600.0,
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
        steps: training steps a trial runs, 2 or more.
        time_limit: seconds for the whole search; the best size proven by then is confirmed and returned.
        objective: ``"memory"`` for the largest, ``"throughput"`` for the smallest within 3 % of the best samples per second measured.
        base_lr, base_batch_size: a learning rate and the global batch size it was tuned at; by default the optimizer's own.
        lr_rule: ``"linear"``, ``"sqrt"``, ``"none"``, ``"auto"``, or ``rule(base_lr, global_batch_size, base_batch_size) -> lr``.
        global_batch_size: rows one optimizer step should see; gives the accumulation steps.
        dataset_size, epochs: for steps per epoch and in all; the batch never exceeds the data set.
        isolate: run the trials in a worker process: nothing a trial does can reach this one.
        probe_timeout: seconds one probe may take in a worker.
        progress: called with the ``Setting``, then a ``Trying`` before and a ``Probe`` after every trial.

    Raises:
        InvalidRequest: an argument cannot be meant.
        DeviceUnavailable: no such device, or one that cannot be held to a limit.
        NoBatchSizeFits: the smallest permitted size does not fit.
        WorkloadFailed: the loss cannot be trained on, or (isolated) the user's code raised.
        WorkerFailed: the worker died or hung.
        Exception: whatever the user's code raises in this process, as it is, with the batch size noted on it.
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
        global_batch_size=global_batch_size,
        dataset_size=dataset_size,
        epochs=epochs,
        objective=objective,
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
    with _open(what, where, isolate, probe_timeout) as prober:
        return Run(prober, request, options, progress).plan()


@contextlib.contextmanager
def _open(what: dict[str, Any], where: dict[str, Any], isolate: bool, probe_timeout: float) -> Iterator[Prober]:
    """Give a prober for the workload and put everything back after it, random states included."""
    from autobatch.devices import open_device
    from autobatch.probe.inline import InlineProber
    from autobatch.probe.worker import WorkerProber
    from autobatch.workload.state import keep_random_state
    from autobatch.workload.workload import build_workload

    device = None if isolate else open_device(where["device"])
    with keep_random_state():
        workload = build_workload(**what)  # isolated too: a mistake is told before a process is started
        prober: Prober
        if device is not None:
            prober = InlineProber(workload, device, memory_budget=where["memory_budget"], margin=where["margin"])
        else:
            import cloudpickle

            name = None if where["device"] is None else str(where["device"])
            prober = WorkerProber(payload=cloudpickle.dumps(what), options={**where, "device": name}, probe_timeout=probe_timeout)
        with contextlib.closing(prober):
            yield prober
