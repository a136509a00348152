"""The CUDA device against a small card played in Python: a fraction, a cache, peaks, and NVML as drivers really answer."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from played_card import Card, Driver

from autobatch import DeviceUnavailable
from autobatch.core.units import GIB, MIB
from autobatch.devices.base import set_budget
from autobatch.devices.cuda import CudaDevice, driver_spills, slice_of
from autobatch.devices.nvml import Nvml


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


@pytest.mark.parametrize(
    ("visible", "index", "found"),
    [
        ("MIG-5f6d2c", 0, "MIG-5f6d2c"),
        ("GPU-aaaa,MIG-GPU-bbbb/3/0", 1, "MIG-GPU-bbbb/3/0"),
        ("2,3", 1, ""),
        ("GPU-aaaa", 0, ""),
        ("MIG-5f6d2c", 1, ""),
        ("", 0, ""),
    ],
)
def test_a_slice_that_was_made_visible_is_asked_for_by_its_id(visible: str, index: int, found: str) -> None:
    assert slice_of(index, {"CUDA_VISIBLE_DEVICES": visible}) == found
    assert slice_of(index, {}) == ""


@pytest.mark.parametrize("visible", ["7", "GPU-1234-abcd", "GPU-1234", "MIG-9999-ffff"])
def test_however_a_card_was_made_visible_its_neighbours_are_found(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    known = visible.encode() if visible.startswith("MIG") else b"GPU-1234-abcd"
    reading = device(Card(), Driver([(1, GIB)], known=known)).memory()
    assert [(other.pid, other.used) for other in reading.others] == [(1, GIB)]
    assert reading.notes == ()


@pytest.mark.parametrize(
    ("system", "release", "spills"),
    [
        ("win32", "10", True),
        ("linux", "5.15.153.1-microsoft-standard-WSL2", True),
        ("linux", "4.4.0-19041-Microsoft", True),
        ("linux", "6.8.0-45-generic", False),
    ],
)
def test_only_windows_drivers_spill(system: str, release: str, spills: bool) -> None:
    assert driver_spills(system, release) is spills


def test_the_real_nvml_without_a_driver_is_a_note() -> None:
    assert len(Nvml().card("GPU-00000000-0000-0000-0000-000000000000").notes) == 1


def test_a_card_that_is_not_there_says_which_are() -> None:
    with pytest.raises(DeviceUnavailable, match=r"There is no cuda:7: torch sees 2, cuda:0 \(Tiny 24\), cuda:1 \(Tiny 24\)\."):
        CudaDevice(7, cuda=Card(count=2))
    with pytest.raises(DeviceUnavailable, match="CUDA is not available.*--device cpu"):
        CudaDevice(0, cuda=Card(count=0))
