"""From one sample to batches of any size: rows are repeated, nests keep their shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from autobatch.core.errors import InvalidRequest

# Rows read from a data set to stand for the rest: enough for a batch that looks like one, few enough to be quick to decode.
DATASET_ROWS = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A batch as the training loop gets it, able to become a batch of any size.

    Attributes:
        value: the nest of tensors; dimension 0 counts rows.
        rows: rows in it.
        dataset_size: rows in the data set it came from, ``None`` when it came alone.
        notes: how it was taken.
    """

    value: Any
    rows: int
    dataset_size: int | None = None
    notes: tuple[str, ...] = ()

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
        return _from_loader(sample)
    if isinstance(sample, Dataset):
        return _from_dataset(sample, default_collate, DATASET_ROWS)
    return Sample(sample, _count_rows(sample))


def dataset_size(sample: Any) -> int | None:
    """Return the rows in a ``Dataset`` or behind a ``DataLoader``; ``None`` for anything else and for streams."""
    if isinstance(sample, Sample):
        return sample.dataset_size
    dataset = sample.dataset if isinstance(sample, DataLoader) else sample
    if not isinstance(dataset, Dataset) or isinstance(dataset, IterableDataset):
        return None
    return len(dataset)  # type: ignore[arg-type]


def to_device(batch: Any, device: torch.device) -> Any:
    """Return ``batch`` with every tensor on ``device``."""
    return map_tensors(batch, lambda leaf: leaf.to(device))


def _from_loader(loader: DataLoader[Any]) -> Sample:
    if isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        value = next(iter(loader), None)
        if value is None:
            raise InvalidRequest("The sample is a DataLoader that yields nothing. Give one with at least one batch.")
        return Sample(value, _count_rows(value))
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
    return Sample(value, _count_rows(value), size, (f"the data set's first {len(items)} rows were repeated to fill each batch",))


def _count_rows(value: Any) -> int:
    """Return the length of dimension 0, the same in every tensor of ``value``."""
    leaves = list(_leaves(value, "sample"))
    if not leaves:
        raise InvalidRequest(
            f"The sample ({type(value).__name__}) holds no tensor, so there are no rows to count. Give a batch as your training loop "
            "gets it, or make_batch=, a function that builds n rows."
        )
    name, first = leaves[0]
    for other_name, other in leaves:
        if other.dim() == 0:
            raise InvalidRequest(f"{other_name} is a scalar tensor and has no rows. Give make_batch=, a function that builds n rows.")
        if len(other) != len(first):
            raise InvalidRequest(
                f"{other_name} has {len(other)} rows but {name} has {len(first)}: dimension 0 must count the batch's rows in every "
                "tensor. Give a sample in which they agree, or make_batch=, a function that builds n rows."
            )
    if len(first) == 0:
        raise InvalidRequest("The sample is empty: its tensors have 0 rows. Give at least one row.")
    return len(first)


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


def tensor_bytes(value: Any) -> int:
    """Return the bytes of the tensors in a nest."""
    return sum(leaf.numel() * leaf.element_size() for _, leaf in _leaves(value, "value"))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return ``value`` with ``change`` applied to its tensors; containers keep their type, anything else stays as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        items = {key: map_tensors(item, change) for key, item in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {f.name: map_tensors(getattr(value, f.name), change) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **changes)
    return value
