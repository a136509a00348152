from __future__ import annotations

import dataclasses
from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from autobatch import InvalidRequest
from autobatch.workload.batches import take_sample

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Graph:
    nodes: torch.Tensor
    labels: torch.Tensor
    name: str = "graph"


class Encoding(UserDict[str, torch.Tensor]):
    """Stands for the mapping types of tokenizers."""


def rows() -> torch.Tensor:
    return torch.arange(3.0)


@given(st.integers(1, 20))
def test_rows_are_repeated_in_order(batch_size: int) -> None:
    grown = take_sample(rows()).grow(batch_size)
    assert grown.tolist() == [float(i % 3) for i in range(batch_size)]


def test_a_batch_is_fresh_and_never_the_sample_itself() -> None:
    sample = rows()
    take_sample(sample).grow(2).add_(10)
    take_sample(sample).grow(3).add_(10)
    assert sample.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "value",
    [
        (rows(), rows()),
        [rows(), {"a": rows()}],
        {"x": rows(), "n": 7},
        Pair(rows(), rows()),
        Graph(rows(), rows()),
        Encoding(x=rows()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_nests_keep_their_type(value: Any) -> None:
    sample = take_sample(value)
    assert sample.rows == 3
    grown = sample.grow(5)
    assert type(grown) is type(value)
    assert take_sample(grown).rows == 5


def test_what_is_no_tensor_stays_as_it_is() -> None:
    assert take_sample({"x": rows(), "mode": "train", "none": None}).grow(1) == {
        "x": torch.zeros(1),
        "mode": "train",
        "none": None,
    }


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((torch.zeros(3, 2), torch.zeros(4)), r"sample\[1\] has 4 rows but sample\[0\] has 3"),
        ({"ids": torch.zeros(3), "mask": torch.zeros(2)}, r"sample\['mask'\] has 2 rows but sample\['ids'\] has 3"),
        (torch.zeros(0, 3), "The sample is empty: its tensors have 0 rows"),
        ({"x": torch.tensor(1.0)}, r"sample\['x'\] is a scalar tensor"),
        ("text", r"The sample \(str\) holds no tensor"),
        ([], "holds no tensor"),
        (None, "No sample given"),
    ],
)
def test_a_sample_that_cannot_be_counted_is_named(sample: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        take_sample(sample)


def test_a_data_set_gives_its_size_and_its_first_rows() -> None:
    sample = take_sample(TensorDataset(torch.arange(1000.0), torch.arange(1000)))
    assert (sample.rows, sample.dataset_size) == (32, 1000)
    assert sample.notes == ("the data set's first 32 rows were repeated to fill each batch",)


def test_a_loader_is_read_with_its_own_collate_and_without_its_workers() -> None:
    def collate(items: list[Any]) -> dict[str, torch.Tensor]:
        return {"x": torch.stack([x for (x,) in items])}

    loader = DataLoader(TensorDataset(torch.arange(10.0)), batch_size=4, shuffle=True, collate_fn=collate, num_workers=2)
    sample = take_sample(loader)
    assert sample.value["x"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert sample.dataset_size == 10


def test_a_stream_has_no_size() -> None:
    class Stream(IterableDataset[torch.Tensor]):
        def __iter__(self) -> Any:
            return iter(torch.arange(100.0))

    assert take_sample(Stream()).dataset_size is None
    assert take_sample(DataLoader(Stream(), batch_size=5)).rows == 5


def test_an_empty_data_set_is_refused() -> None:
    class Nothing(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 0

    with pytest.raises(InvalidRequest, match="empty data set"):
        take_sample(Nothing())
