"""The CUDA device against a small card played in Python: a fraction, a cache, peaks, and NVML as drivers really answer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from autobatch import DeviceUnavailable
from autobatch.core.units import GIB, MIB
from autobatch.devices.base import set_budget
from autobatch.devices.cuda import CudaDevice
from autobatch.devices.nvml import Nvml


class Card:
    """What ``torch.cuda`` is to the device: one 24 GiB card of which others hold some."""

    def __init__(self, others: int = 0, count: int = 1) -> None:
        self.total, self.others, self.count, self.fraction = 24 * GIB, others, count, 1.0
        self.blocks = self.reserved = self.peak_blocks = self.peak_reserved = self.retries = 0

    def allocate(self, size: int) -> None:
        if self.blocks + size > self.reserved:
            if self.blocks + size > self.fraction * self.total:
                raise RuntimeError(f"CUDA out of memory. Tried to allocate {size} bytes")
            self.reserved = self.blocks + size
        self.blocks += size
        self.peak_blocks, self.peak_reserved = max(self.peak_blocks, self.blocks), max(self.peak_reserved, self.reserved)

    def free(self, size: int) -> None:
        self.blocks -= size

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(name="Tiny 24", total_memory=self.total, major=8, minor=6, uuid="1234-abcd")

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return self.total - self.others - self.reserved, self.total

    def memory_reserved(self, index: int) -> int:
        return self.reserved

    def memory_allocated(self, index: int) -> int:
        return self.blocks

    def max_memory_allocated(self, index: int) -> int:
        return self.peak_blocks

    def max_memory_reserved(self, index: int) -> int:
        return self.peak_reserved

    def reset_peak_memory_stats(self, index: int) -> None:
        self.peak_blocks, self.peak_reserved = self.blocks, self.reserved

    def memory_stats(self, index: int) -> dict[str, int]:
        return {"num_alloc_retries": self.retries}

    def get_per_process_memory_fraction(self, index: int) -> float:
        return self.fraction

    def set_per_process_memory_fraction(self, fraction: float, index: int) -> None:
        assert isinstance(fraction, float)
        assert 0 <= fraction <= 1
        self.fraction = fraction

    def empty_cache(self) -> None:
        self.reserved = self.blocks

    def synchronize(self, index: int) -> None:
        pass

    @contextlib.contextmanager
    def device(self, index: int) -> Iterator[None]:
        yield


class Driver:
    """NVML as one driver answers: the processes of one card, or the error it gives instead."""

    class NVMLError(Exception):
        pass

    def __init__(self, processes: list[tuple[int, int | None]] | None = None, known: bytes = b"GPU-1234-abcd", init: str = "") -> None:
        self.processes, self.known, self.init, self.open = processes, known, init, 0

    def nvmlInit(self) -> None:
        if self.init:
            raise self.NVMLError(self.init)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> bytes:
        if uuid != self.known:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, handle: bytes) -> list[Any]:
        if self.processes is None:
            raise self.NVMLError("Insufficient Permissions")
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes]

    def nvmlDeviceGetMemoryInfo(self, handle: bytes) -> Any:
        return SimpleNamespace(used=5 * GIB)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"


def device(card: Card, driver: Driver | None = None) -> CudaDevice:
    return CudaDevice(0, cuda=card, nvml=Nvml(driver or Driver([])))


def test_the_budget_is_what_is_free_and_what_the_allocator_holds_already() -> None:
    card = Card(others=10 * GIB)
    card.allocate(3 * GIB)
    card.free(2 * GIB)
    reading = device(card).memory()
    assert (reading.capacity, reading.free, reading.held) == (24 * GIB, 11 * GIB, 3 * GIB)
    assert set_budget(reading, None, 0.05)[:2] == (14 * GIB, int(14 * GIB * 0.95))


def test_the_cap_makes_an_allocation_fail_and_is_put_back() -> None:
    card = Card()
    card.fraction = 0.75
    cuda = device(card)
    with pytest.raises(RuntimeError, match="CUDA out of memory"), cuda.cap(8 * GIB, 0):
        assert card.fraction == pytest.approx(1 / 3)
        card.allocate(8 * GIB - MIB)
        card.allocate(2 * MIB)
    assert card.fraction == 0.75
    with cuda.cap(24 * GIB, 0):
        assert card.fraction == 0.75  # a cap the user has set is never widened


def test_a_torch_that_cannot_tell_its_fraction_gets_the_default_back() -> None:
    card = Card()
    card.get_per_process_memory_fraction = None  # type: ignore[assignment,method-assign]
    hidden = SimpleNamespace(**{name: getattr(card, name) for name in dir(card) if not name.startswith(("_", "get_per"))})
    with CudaDevice(0, cuda=hidden, nvml=Nvml(Driver([]))).cap(6 * GIB, 0):
        assert card.fraction == pytest.approx(0.25)
        assert int(card.fraction * card.total) == 6 * GIB  # as torch cuts it off
    assert card.fraction == 1.0


def test_peaks_start_again_and_the_cache_is_given_back() -> None:
    card = Card()
    cuda = device(card)
    card.allocate(5 * GIB)
    card.free(4 * GIB)
    assert (cuda.peak().allocated, cuda.peak().reserved) == (5 * GIB, 5 * GIB)
    cuda.reset_peaks()
    assert (cuda.peak().allocated, cuda.peak().reserved) == (GIB, 5 * GIB)
    cuda.release()
    cuda.reset_peaks()
    assert (cuda.peak().reserved, cuda.allocated(), cuda.driver_used()) == (GIB, GIB, GIB)


def test_other_processes_are_named_largest_first_and_this_one_is_left_out() -> None:
    driver = Driver([(os.getppid(), 2 * GIB), (os.getpid(), GIB), (2**22 + 7, 3 * GIB), (2**22 + 8, None)])
    reading = device(Card(), driver).memory()
    assert [(other.pid, other.used) for other in reading.others] == [
        (2**22 + 7, 3 * GIB),
        (os.getppid(), 2 * GIB),
        (2**22 + 8, None),
    ]
    assert reading.others[0].name == ""
    assert reading.others[1].name != ""
    assert (reading.source, reading.notes, driver.open) == ("driver and NVML", (), 0)


@pytest.mark.parametrize(
    ("driver", "note"),
    [
        (
            Driver(init="Driver Not Loaded"),
            "NVML is not available (Driver Not Loaded), so memory held by other processes is known in sum only",
        ),
        (Driver([], known=b"GPU-other"), "it does not know the card 1234-abcd: Not Found"),
        (Driver(None), "NVML does not tell the card's processes: Insufficient Permissions"),
    ],
)
def test_what_nvml_cannot_tell_becomes_a_note(driver: Driver, note: str) -> None:
    reading = device(Card(), driver).memory()
    assert note in reading.notes[0]
    assert reading.others == ()
    assert reading.free == 24 * GIB
    assert driver.open == 0


def test_a_mig_slice_is_found_by_its_own_uuid() -> None:
    reading = device(Card(), Driver([(1, GIB)], known=b"MIG-1234-abcd")).memory()
    assert [other.pid for other in reading.others] == [1]


def test_the_real_nvml_without_a_driver_is_a_note() -> None:
    assert len(Nvml().card("GPU-00000000-0000-0000-0000-000000000000").notes) == 1


def test_a_card_that_is_not_there_says_which_are() -> None:
    with pytest.raises(DeviceUnavailable, match=r"There is no cuda:7: torch sees 2, cuda:0 \(Tiny 24\), cuda:1 \(Tiny 24\)\."):
        CudaDevice(7, cuda=Card(count=2))
    with pytest.raises(DeviceUnavailable, match="CUDA is not available.*--device cpu"):
        CudaDevice(0, cuda=Card(count=0))
