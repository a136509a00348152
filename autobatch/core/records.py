"""The frozen records that pass between the rooms. Bytes are ints, times are seconds, unknown is ``None``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from autobatch.core.errors import InvalidRequest

DEFAULT_MAX_BATCH_SIZE = 2**20


class Outcome(str, Enum):
    """How one probe ended."""

    FIT = "fit"
    TIGHT = "tight"  # ran, but only after the allocator had to give memory back and retry
    OOM = "oom"
    HOST_OOM = "host_oom"
    KERNEL_LIMIT = "kernel_limit"  # an index or grid limit: too large whatever the memory
    TIMEOUT = "timeout"
    CRASHED = "crashed"

    @property
    def fits(self) -> bool:
        """Whether a plan may return a size with this outcome."""
        return self is Outcome.FIT

    @property
    def bounds(self) -> bool:
        """Whether this outcome is a wall that bounds the search from above."""
        return self in (Outcome.TIGHT, Outcome.OOM, Outcome.HOST_OOM, Outcome.KERNEL_LIMIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The highest memory use of one phase.

    Attributes:
        allocated: bytes handed out to tensors at the highest point.
        reserved: bytes the caching allocator held from the driver at its highest; ``None`` where there is none.
    """

    allocated: int
    reserved: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One measured batch size.

    Attributes:
        batch_size: rows in the batch that was run.
        outcome: how the trial ended.
        steps: training steps that were completed.
        forward_backward: peak of the forward and backward passes, ``None`` when not measured.
        optimizer: peak of the optimizer step, ``None`` when there is no optimizer or it was not measured.
        allocation_retries: times the allocator gave its cache back and tried again, ``None`` when not counted.
        driver_used: bytes in use on the whole device as the driver reports them after the trial.
        seconds_per_step: median wall time of a step, first step excluded.
        seconds_spread: slowest less fastest step, first step excluded.
        seconds: wall time of the whole trial.
        confirmation: whether this was the longer trial that confirms an answer.
        message: why it did not fit, empty when it did.
        notes: what was noticed during the trial (leaked bytes, a loss that is not finite).
    """

    batch_size: int
    outcome: Outcome
    steps: int = 0
    forward_backward: Peak | None = None
    optimizer: Peak | None = None
    allocation_retries: int | None = None
    driver_used: int | None = None
    seconds_per_step: float | None = None
    seconds_spread: float | None = None
    seconds: float | None = None
    confirmation: bool = False
    message: str = ""
    notes: tuple[str, ...] = ()

    @property
    def peak_allocated(self) -> int | None:
        """Bytes allocated at the highest point of any phase."""
        return max((p.allocated for p in (self.forward_backward, self.optimizer) if p is not None), default=None)

    @property
    def peak_reserved(self) -> int | None:
        """Bytes reserved at the highest point of any phase."""
        reserved = [p.reserved for p in (self.forward_backward, self.optimizer) if p is not None and p.reserved is not None]
        return max(reserved, default=None)

    @property
    def samples_per_second(self) -> float | None:
        """Rows per second at the median step time."""
        return self.batch_size / self.seconds_per_step if self.seconds_per_step else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """The batch sizes that may be tried: multiples of ``multiple_of`` in ``[min, max]``, to a relative ``tolerance``.

    Raises:
        InvalidRequest: the bounds leave nothing to try.
    """

    min: int = 1
    max: int = DEFAULT_MAX_BATCH_SIZE
    multiple_of: int = 1
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        for name, value in (("min_batch_size", self.min), ("max_batch_size", self.max), ("multiple_of", self.multiple_of)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidRequest(f"{name} is {value!r}; a whole number of rows is wanted, for example 32.")
            if value < 1:
                raise InvalidRequest(f"{name} is {value}; a batch has at least one row. Give {name} of 1 or more.")
        if self.min > self.max:
            raise InvalidRequest(
                f"min_batch_size {self.min} is above max_batch_size {self.max}: no size lies between. Lower the one or raise the other."
            )
        if self.first > self.last:
            raise InvalidRequest(
                f"No multiple of {self.multiple_of} lies between {self.min} and {self.max}. "
                f"Lower multiple_of or raise max_batch_size to {self.first}."
            )
        if not (isinstance(self.tolerance, (int, float)) and math.isfinite(self.tolerance) and 0 <= self.tolerance < 1):
            raise InvalidRequest(f"tolerance is {self.tolerance!r}; a fraction from 0 (exact) to below 1 is wanted, for example 0.01.")

    @property
    def first(self) -> int:
        """The smallest permitted batch size."""
        return -(-self.min // self.multiple_of) * self.multiple_of

    @property
    def last(self) -> int:
        """The largest permitted batch size."""
        return self.max // self.multiple_of * self.multiple_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """Memory another process holds on the device.

    Attributes:
        pid: process number, as the driver sees it.
        name: program name, empty when it may not be read.
        used: bytes held, ``None`` when the driver does not say.
    """

    pid: int
    name: str = ""
    used: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReading:
    """What a device's memory looks like at one moment, in bytes.

    Attributes:
        capacity: all the memory the device has.
        free: what the device can still give this process.
        held: what this process's allocator already holds, reusable by it.
        others: other processes on the device, largest first.
        source: where the figures come from: ``"nvml"``, ``"torch"``, ``"cgroup"``, ``"psutil"``.
        notes: what limits the reading.
    """

    capacity: int
    free: int
    held: int = 0
    others: tuple[ProcessMemory, ...] = ()
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def obtainable(self) -> int:
        """Bytes this process can use in all: what is free and what it holds already."""
        return min(self.free + self.held, self.capacity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a prober knows before its first probe: the device, the limit and the workload.

    Attributes:
        device: device name as torch writes it, ``"cuda:0"`` or ``"cpu"``.
        device_description: what it is, ``"NVIDIA H200"`` or ``"CPU"``.
        reading: the device's memory when the budget was set.
        budget: bytes the training step may use, margin included.
        cap: bytes a trial may use: the budget less the margin.
        margin: fraction of the budget kept free.
        resident: bytes of parameters, buffers, gradients and optimizer state held before the first trial.
        mode: ``"train"`` or ``"eval"``.
        precision: ``"fp32"``, ``"bf16"``, ``"fp16"`` or ``None`` for the model's own.
        has_optimizer: whether the optimizer step is part of a trial.
        has_batch_norm: whether the model normalises over the batch.
        group_lrs: learning rate of each of the optimizer's parameter groups, empty without an optimizer.
        group_options: what else a rule may scale, by group: ``beta1``, ``beta2``, ``alpha``, ``eps``, ``weight_decay``,
            ``decoupled_weight_decay``.
        optimizer_name: class name of the optimizer, empty without one.
        batch_norm_momentum: that of the model's first batch normalisation, ``None`` without one.
        dataset_size: rows in the data set the sample came from, ``None`` when it was not a data set.
        environment: versions and machine, name to text.
        notes: what the user should know about how the step was built.
        defaults: plan options (``base_lr``, ``global_batch_size``, …) that the target itself named.
        evidence: ``"measured"``, or ``"simulated"`` for a card that is not here.
        spills: whether the driver may move what does not fit to host memory instead of failing.
        expected: what a simulation expects a step to need at its highest, as (batch size, bytes), smallest first; empty without one.
    """

    device: str
    device_description: str
    reading: MemoryReading
    budget: int
    cap: int
    margin: float
    resident: int = 0
    mode: str = "train"
    precision: str | None = None
    has_optimizer: bool = False
    has_batch_norm: bool = False
    group_lrs: tuple[float, ...] = ()
    group_options: tuple[Mapping[str, float], ...] = ()
    optimizer_name: str = ""
    batch_norm_momentum: float | None = None
    dataset_size: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    evidence: str = "measured"
    spills: bool = False
    expected: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trying:
    """A trial that is about to start.

    Attributes:
        batch_size: rows in the batch.
        confirmation: whether it is the longer trial that confirms an answer.
        best: largest size that fitted so far.
        wall: smallest size that did not fit so far.
    """

    batch_size: int
    confirmation: bool = False
    best: int | None = None
    wall: int | None = None
