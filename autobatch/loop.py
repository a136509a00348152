"""The one loop: ask the search for a size, probe it, tell the search; then confirm the answer and plan with it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Protocol

from autobatch.core.epochs import share
from autobatch.core.errors import DeviceUnavailable, NoBatchSizeFits, WorkloadFailed
from autobatch.core.memory_model import MemoryModel, through_points
from autobatch.core.options import PlanRequest, SearchOptions
from autobatch.core.plan import BatchPlan, make_plan, micro_batch
from autobatch.core.records import MemoryReading, Outcome, Probe, Setting, Trying
from autobatch.core.search import Ending, Search
from autobatch.core.spilling import spilled
from autobatch.core.throughput import fast_enough, next_to_time, step_times
from autobatch.core.units import divide_up, format_bytes

Progress = Callable[[Setting | Trying | Probe], None]

# What a wall says of the limit; any other is memory.
_LIMITS = {Outcome.KERNEL_LIMIT: "kernel_limit", Outcome.CRASHED: "crash"}
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
        self._model = MemoryModel(self._setting.cap, through_points(self._setting.expected))
        self._search = Search(self._space, self._model)
        self._deadline = None if options.time_limit is None else time.monotonic() + options.time_limit
        self._walls: dict[int, Probe] = {}
        self._confirmed: set[int] = set()
        self._notes: list[str] = []
        self._narrowed = self._strict = False
        self.probes: list[Probe] = []

    def plan(self) -> BatchPlan:
        """Return the plan for the largest batch size that was run, confirmed, and fits, or for the smallest of them that is fast enough.

        Raises:
            NoBatchSizeFits: not even the smallest permitted size fits.
        """
        self._progress(self._setting)
        while True:
            self._explore()
            untimed, chosen, narrowed = self._untimed(), self._chosen(), False
            if untimed is not None:
                probe = self._probe(untimed, steps=self._steps(confirm=True))
            elif chosen in self._confirmed:
                return self._finish(chosen)
            else:
                probe = self._probe(chosen, steps=self._steps(confirm=True), confirm=True)
                self._confirmed.add(chosen)
                narrowed = self._take_in_a_neighbour()
            if not probe.outcome.fits:
                self._reject(probe, narrowed)

    def _take_in_a_neighbour(self) -> bool:
        """Return whether the prober has found less memory than before, and go by that from now on."""
        narrowed = self._prober.setting.cap < self._setting.cap
        self._setting = self._prober.setting
        return narrowed

    def _reject(self, probe: Probe, narrowed: bool) -> None:
        """Search on below a size that was thought to fit and does not.

        Raises:
            DeviceUnavailable: memory went to a neighbour twice.
        """
        size = probe.batch_size
        if narrowed and self._narrowed:
            raise DeviceUnavailable(_neighbours(self._setting, size))
        self._narrowed, self._strict = self._narrowed or narrowed, True
        self._search.reject(size, barely=not narrowed)
        for known in self.probes:
            if (known.peak_allocated or 0) > self._setting.cap and known.batch_size <= (self._search.best or 0):
                self._search.reject(known.batch_size)
        if not narrowed:
            what = "fitted once and failed the longer trial that was to confirm it" if probe.confirmation else "did not fit though more did"
            self._notes.append(f"batch size {size} {what}: {probe.message or 'no reason was given'}")

    def _explore(self) -> None:
        """Probe until the search has ended or the time is up."""
        while not (self._out_of_time() and self._search.best is not None):
            size = self._search.ask()
            if size is None:
                break
            try:
                probe = self._probe(size, steps=self._steps())
            except (ValueError, WorkloadFailed) as error:
                self._start_at_two(size, error)
                continue
            if probe.outcome is Outcome.TIMEOUT:
                self._deadline = 0.0  # the prober's clock started earlier than this one
                break
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
        self._model = MemoryModel(self._setting.cap, through_points(self._setting.expected))
        self._search = Search(self._space, self._model)

    def _steps(self, *, confirm: bool = False) -> int:
        """Return the training steps of a trial: one less than asked for, and two at the least; all of them for the one that confirms.

        In the second step the optimizer's state is resident, so a third says nothing new of the memory, as long as no confirmation has
        failed. Times want more of them.
        """
        asked = max(5, self._options.steps) if self._for_speed else self._options.steps
        return max(3, asked) if confirm or self._strict else max(2, asked - 1)

    def _probe(self, size: int, *, steps: int, confirm: bool = False) -> Probe:
        self._progress(Trying(batch_size=size, confirmation=confirm, best=self._search.best, wall=self._search.wall))
        probe = self._prober.probe(size, steps=steps, confirm=confirm)
        if self._setting.spills:
            probe = spilled(probe, self.probes)
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
        return (self._for_speed and fast_enough(self._times(), self._request.fast_enough)) or best

    @property
    def _for_speed(self) -> bool:
        return self._request.objective == "throughput" and self._request.global_batch_size is None

    def _times(self) -> dict[int, float]:
        return step_times(self.probes, self._search.best)

    def _untimed(self) -> int | None:
        """Return the size whose time would tell which one is fast enough, ``None`` when that is known or not asked."""
        best = self._search.best
        if not self._for_speed or best is None or self._out_of_time():
            return None
        return next_to_time(self._times(), self._space, best, self._request.fast_enough)

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
            wall=search.predicted_wall if search.ending is Ending.PREDICTED_WALL else search.wall,
            wall_kind={Ending.PROBED_WALL: "probed", Ending.PREDICTED_WALL: "predicted"}.get(search.ending) if search.ending else None,
            limited_by=self._limited_by(chosen, best),
            exact=search.exact,
            notes=self._notes,
        )

    def _limited_by(self, chosen: int, best: int) -> str:
        request, space = self._request, self._space
        if chosen < best and self._for_speed:
            return "throughput"
        if self._search.ending is None:
            return "time_limit"
        if self._search.ending is Ending.LIMIT:
            if request.global_batch_size is not None and space.max == divide_up(request.global_batch_size, request.world_size):
                return "global_batch_size"
            rows = None if request.dataset_size is None else share(request.dataset_size, request.world_size, request.drop_last)
            if space.max == rows:
                return "dataset"
            return "max_batch_size"
        wall = self._walls.get(self._search.wall or 0)
        return _LIMITS.get(wall.outcome, "memory") if wall is not None else "memory"

    def _nothing_fits(self) -> NoBatchSizeFits:
        size, setting = self._space.first, self._setting
        failed = self._walls[size]
        needed = failed.peak_allocated
        parts = [
            f"Not even batch size {size} fits: a trial may use {format_bytes(setting.cap)} "
            f"(budget {format_bytes(setting.budget)} less the margin of {setting.margin:.0%}) on {setting.device}",
            f"and it needs more than {format_bytes(max(needed or 0, setting.resident))}"
            f" ({format_bytes(setting.resident)} of it parameters and buffers).",
            _who_holds_the_rest(setting),
            f"The trial said: {failed.message}." if failed.message else "",
            "Next: raise --memory-budget (memory_budget=), shorten or shrink the sample, use precision bf16, or a smaller model.",
        ]
        return NoBatchSizeFits(" ".join(part for part in parts if part), batch_size=size, needed=needed, available=setting.cap)


def _who_holds_the_rest(setting: Setting) -> str:
    """Return where the device's memory is that a trial could not use."""
    reading = setting.reading
    amount = f"{format_bytes(reading.obtainable)} of the device's {format_bytes(reading.capacity)}"
    if setting.budget < reading.obtainable:
        return f"{amount} could be had."
    holders = _holders(reading)
    return f"More than {amount} cannot be had now" + (f": others hold the rest, {holders}." if holders else ".")


def _holders(reading: MemoryReading) -> str:
    return ", ".join(f"{other.name or 'a process'} (pid {other.pid}) {format_bytes(other.used or 0)}" for other in reading.others)


def _neighbours(setting: Setting, batch_size: int) -> str:
    left, holders = format_bytes(setting.reading.obtainable), _holders(setting.reading)
    return (
        f"Memory on {setting.device} went to others twice during the search: batch size {batch_size} fitted, and at its confirmation only "
        f"{left} could be had{f'; others hold {holders}' if holders else ''}. Next: try again when they have ended, choose another device, "
        "or give --memory-budget (memory_budget=) an amount that stays free."
    )
