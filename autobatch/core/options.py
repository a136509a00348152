"""What the user asks for: how to search, and what the answer is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from autobatch.core.epochs import share
from autobatch.core.errors import InvalidRequest
from autobatch.core.learning_rate import BASE_BATCH_SIZE, check_rule, is_positive
from autobatch.core.records import DEFAULT_MAX_BATCH_SIZE, SearchSpace
from autobatch.core.units import counted, divide_up

# A size is worth less memory when its samples per second are this close to the best.
FAST_ENOUGH = 0.97


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What the answer is wanted for: everything about training that is not the search itself.

    Attributes:
        base_lr: learning rate tuned at ``base_batch_size``; ``None`` takes the optimizer's own.
        base_batch_size: global batch size ``base_lr`` belongs to.
        lr_rule: a name in ``RULES``, ``"auto"``, or a callable ``rule(base_lr, global_batch, base_batch) -> lr``.
        noise_scale: gradient noise scale in rows, for the rules that need one.
        global_batch_size: rows one optimizer step should see, over accumulation and ranks.
        dataset_size: rows in the data set; caps the batch size.
        epochs: passes over the data set.
        drop_last: whether loader and sampler leave out what does not fill a batch or share out equally.
        world_size: ranks training together.
        objective: ``"memory"`` or ``"throughput"``.
        fast_enough: share of the best measured samples per second that ``"throughput"`` asks for.
    """

    base_lr: float | None = None
    base_batch_size: int = BASE_BATCH_SIZE
    lr_rule: Any = "linear"
    noise_scale: float | None = None
    global_batch_size: int | None = None
    dataset_size: int | None = None
    epochs: int | None = None
    drop_last: bool = False
    world_size: int = 1
    objective: str = "memory"
    fast_enough: float = FAST_ENOUGH

    def __post_init__(self) -> None:
        counts = ("base_batch_size", "global_batch_size", "dataset_size", "epochs", "world_size")
        for name in counts:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidRequest(f"{name} is {value!r}; a whole number of 1 or more is wanted.")
        if self.base_lr is not None and not is_positive(self.base_lr):
            raise InvalidRequest(f"base_lr is {self.base_lr!r}; a learning rate above zero is wanted, for example 0.1.")
        if self.objective not in ("memory", "throughput"):
            raise InvalidRequest(f"objective is {self.objective!r}; known: memory, throughput.")
        if not (isinstance(self.fast_enough, (int, float)) and 0 < self.fast_enough < 1):
            raise InvalidRequest(f"fast_enough is {self.fast_enough!r}; a fraction between 0 and 1 is wanted, for example 0.95.")
        check_rule(self.lr_rule, self.noise_scale)
        self._check_shares()

    def _check_shares(self) -> None:
        """Refuse sizes of which some device would get no row."""
        if self.global_batch_size is not None and self.global_batch_size < self.world_size:
            raise InvalidRequest(
                f"global_batch_size {self.global_batch_size} is below the {self.world_size} devices: some would have no row. "
                f"Give global_batch_size of {self.world_size} or more, or fewer devices."
            )
        if self.dataset_size is not None and self.drop_last and self.dataset_size < self.world_size:
            raise InvalidRequest(
                f"With drop_last, a data set of {self.dataset_size} rows gives {self.world_size} devices no row each. Leave out drop_last."
            )

    def with_defaults(self, defaults: Mapping[str, Any]) -> PlanRequest:
        """Return this request with ``defaults`` where it still has its own default value."""
        return with_defaults(self, defaults)


Options = TypeVar("Options")


def with_defaults(options: Options, defaults: Mapping[str, Any]) -> Options:
    """Return the record ``options`` with ``defaults`` in those fields that still have the record's own default value."""
    changes = {
        f.name: defaults[f.name]
        for f in dataclasses.fields(options)  # type: ignore[arg-type]
        if f.name in defaults and getattr(options, f.name) == f.default
    }
    return dataclasses.replace(options, **changes)  # type: ignore[type-var]


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
        if request.dataset_size is not None:
            limits.append(share(request.dataset_size, request.world_size, request.drop_last))
            if request.drop_last and limits[-1] < space.first:
                raise InvalidRequest(
                    f"With drop_last, the {counted(limits[-1], 'row')} that the data set has for a device make no batch of {space.first}. "
                    "Lower min_batch_size or multiple_of, or leave out drop_last."
                )
        if request.global_batch_size is not None:
            limits.append(divide_up(request.global_batch_size, request.world_size))
        return dataclasses.replace(space, max=max(min(limits), space.first))
