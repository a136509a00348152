"""From one sample to batches of any size: rows are repeated, nests keep their shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from autobatch.core.errors import InvalidRequest

# Rows read from a data set to stand for the rest: enough for a batch that looks like one, few enough to be quick to decode.
DATASET_ROWS = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Feeding:
    """How a data loader keeps batches ready in host memory.

    Attributes:
        workers: its worker processes, 0 for none.
        prefetch: batches each of them keeps ready.
        pinned: whether the next batch is copied to page-locked memory.
    """

    workers: int = 0
    prefetch: int = 0
    pinned: bool = False

    @property
    def waiting(self) -> int:
        """Batches in host memory beside the one that is trained on."""
        return self.workers * self.prefetch + self.pinned

    def __str__(self) -> str:
        return f"{self.workers} workers × {self.prefetch}{', 1 pinned' if self.pinned else ''}"


UNFED = Feeding()


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A batch as the training loop gets it, able to become a batch of any size.

    Attributes:
        value: the nest of tensors; dimension 0 counts rows.
        rows: rows in it.
        dataset_size: rows in the data set it came from, ``None`` when it came alone.
        notes: how it was taken.
        feeding: how the data loader that it came from keeps batches ready.
    """

    value: Any
    rows: int
    dataset_size: int | None = None
    notes: tuple[str, ...] = ()
    feeding: Feeding = UNFED

    def grow(self, batch_size: int) -> Any:
        """Return a fresh batch of ``batch_size`` rows, the sample's rows repeated in order."""
        return map_tensors(self.value, lambda leaf: _repeat(leaf, self.rows, batch_size))


def take_sample(sample: Any) -> Sample:
    """Return ``sample`` as a :class:`Sample`: a batch, a ``Dataset`` or a ``DataLoader``.

    Raises:
        InvalidRequest: it holds no tensor or no row, or its tensors differ in the length of dimension 0.
    """
    if sample is None:
        raise InvalidRequest("No sample given. Give a batch as your training loop gets it, a Dataset, a DataLoader, or make_batch=.")
    if isinstance(sample, Sample):
        return sample
    if isinstance(sample, DataLoader):
        return dataclasses.replace(_from_loader(sample), feeding=feeding_of(sample))
    if isinstance(sample, Dataset):
        return _from_dataset(sample, default_collate, DATASET_ROWS)
    return Sample(sample, count_rows(sample))


def shortened(sample: Any, batches_are_made: bool) -> Sample:
    """Return the rows of ``sample`` that stand for the rest, so that no data set is sent to a worker; none where batches are made.

    Raises:
        InvalidRequest: as ``take_sample``.
    """
    if not batches_are_made:
        return take_sample(sample)
    return Sample(None, 0, dataset_size(sample), feeding=feeding_of(sample))


def dataset_size(sample: Any) -> int | None:
    """Return the rows in a ``Dataset`` or behind a ``DataLoader``; ``None`` for anything else and for streams."""
    if isinstance(sample, Sample):
        return sample.dataset_size
    dataset = sample.dataset if isinstance(sample, DataLoader) else sample
    if not isinstance(dataset, Dataset) or isinstance(dataset, IterableDataset):
        return None
    return len(dataset)  # type: ignore[arg-type]


def feeding_of(sample: Any) -> Feeding:
    """Return how a ``DataLoader`` keeps batches ready; anything else keeps none."""
    if isinstance(sample, Sample):
        return sample.feeding
    if not isinstance(sample, DataLoader):
        return UNFED
    return Feeding(sample.num_workers, sample.prefetch_factor or 0, sample.pin_memory)


def host_bytes(batch: Any) -> int:
    """Return the bytes of the tensors of ``batch`` that lie in host memory."""
    return sum(leaf.nbytes for _, leaf in _leaves(batch, "batch") if leaf.device.type == "cpu")


def to_device(batch: Any, device: torch.device) -> Any:
    """Return ``batch`` with every tensor on ``device``."""
    return map_tensors(batch, lambda leaf: leaf.to(device))


def _from_loader(loader: DataLoader[Any]) -> Sample:
    if isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        value = next(iter(loader), None)
        if value is None:
            raise InvalidRequest("The sample is a DataLoader that yields nothing. Give one with at least one batch.")
        return Sample(value, count_rows(value))
    return _from_dataset(loader.dataset, loader.collate_fn, min(loader.batch_size, DATASET_ROWS))


def _from_dataset(dataset: Dataset[Any], collate: Callable[[list[Any]], Any], rows: int) -> Sample:
    if isinstance(dataset, IterableDataset):
        items = [item for item, _ in zip(dataset, range(rows), strict=False)]
        size = None
    else:
        size = dataset_size(dataset)
        items = [dataset[i] for i in range(min(size or 0, rows))]
    if not items:
        raise InvalidRequest("The sample is an empty data set. Give one with at least one row.")
    value = collate(items)
    return Sample(value, count_rows(value), size, (f"the data set's first {len(items)} rows were repeated to fill each batch",))


def count_rows(value: Any, name: str = "sample", remedy: str = "make_batch=, a function that builds n rows") -> int:
    """Return the length of dimension 0, the same in every tensor of ``value``; messages call it ``name`` and offer the ``remedy``.

    Raises:
        InvalidRequest: it holds no tensor or no row, or its tensors differ in the length of dimension 0; the message names the leaf.
    """
    leaves = list(_leaves(value, name))
    if not leaves:
        raise InvalidRequest(
            f"The {name} ({type(value).__name__}) holds no tensor, so there are no rows to count. Give a batch as your training loop "
            f"gets it, or {remedy}."
        )
    first_name, first = leaves[0]
    for other_name, other in leaves:
        if other.dim() == 0:
            raise InvalidRequest(f"{other_name} is a scalar tensor and has no rows. Give {remedy}.")
        if len(other) != len(first):
            raise InvalidRequest(
                f"{other_name} has {len(other)} rows but {first_name} has {len(first)}: dimension 0 must count the batch's rows in every "
                f"tensor. Give a {name} in which they agree, or {remedy}."
            )
    if len(first) == 0:
        raise InvalidRequest(f"The {name} is empty: its tensors have 0 rows. Give at least one row.")
    return len(first)


def cut(value: Any, rows: int, part: slice) -> Any:
    """Return rows ``part`` of the batch ``value`` of ``rows`` rows: its tensors as views, and lists of one plain entry a row."""

    def is_column(leaf: Any) -> bool:
        return type(leaf) in (list, tuple, np.ndarray) and len(leaf) == rows and not any(_leaves(leaf, ""))

    return map_leaves(value, lambda leaf: leaf[part], lambda leaf: isinstance(leaf, Tensor) or is_column(leaf))


def _repeat(leaf: Tensor, rows: int, batch_size: int) -> Tensor:
    with torch.no_grad():
        if batch_size <= rows:
            return leaf[:batch_size].clone()
        return leaf.index_select(0, torch.arange(batch_size, device=leaf.device).remainder_(rows))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), f"{name}.{field.name}")


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return ``value`` with ``change`` applied to its tensors; containers keep their type, anything else stays as it is."""
    return map_leaves(value, change, lambda leaf: isinstance(leaf, Tensor))


def map_leaves(value: Any, change: Callable[[Any], Any], is_leaf: Callable[[Any], bool]) -> Any:
    """Return ``value`` with ``change`` applied to what ``is_leaf``; containers keep their type, anything else stays as it is."""
    if is_leaf(value):
        return change(value)
    if isinstance(value, Mapping):
        items = {key: map_leaves(item, change, is_leaf) for key, item in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(item, change, is_leaf) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_leaves(item, change, is_leaf) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {f.name: map_leaves(getattr(value, f.name), change, is_leaf) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **changes)
    return value
