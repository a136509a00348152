"""NVIDIA cards: the caching allocator's figures, its cap, and the driver's view of the rest."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from autobatch.core.errors import DeviceUnavailable
from autobatch.core.records import MemoryReading, Outcome, Peak
from autobatch.devices import oom
from autobatch.devices.lock import card_lock
from autobatch.devices.nvml import CardUse, Nvml


class CudaDevice:
    """One card, as torch numbers it.

    Args:
        index: torch's number of the card; ``None`` for the current one.
        cuda: what to call, by default ``torch.cuda``.
        nvml: who else is on the card, by default the driver's NVML.

    Raises:
        DeviceUnavailable: torch sees no such card.
    """

    def __init__(self, index: int | None = None, *, cuda: Any = None, nvml: Nvml | None = None) -> None:
        if cuda is None:
            import torch

            cuda = torch.cuda
        self._cuda, self._nvml = cuda, nvml or Nvml()
        self._index = _checked(index, cuda)
        self._properties = cuda.get_device_properties(self._index)
        self.name = f"cuda:{self._index}"
        self.notes: tuple[str, ...] = ()
        self.description = str(self._properties.name)
        self.capability: tuple[int, int] | None = (self._properties.major, self._properties.minor)
        self.is_host, self.spills = False, driver_spills(sys.platform, platform.release())
        self._uuid = slice_of(self._index, os.environ) or str(getattr(self._properties, "uuid", ""))

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Make the card the current one, as a training script would, once no other search is on it."""
        with card_lock(self._uuid or self.name, self.name) as note, self._cuda.device(self._index):
            self.notes = (note,) if note else ()
            yield

    def memory(self) -> MemoryReading:
        """Return the card's memory: what the driver can still give, what this process's allocator holds, and who holds the rest.

        Asking creates the CUDA context, so that its memory is not promised to the training step.
        """
        free, total = self._cuda.mem_get_info(self._index)
        card = self._card()
        return MemoryReading(
            capacity=total,
            free=free,
            held=self._cuda.memory_reserved(self._index),
            others=card.others,
            source="driver" if card.used is None else "driver and NVML",
            notes=card.notes,
        )

    @contextlib.contextmanager
    def cap(self, limit: int, held: int) -> Iterator[None]:  # noqa: ARG002 the allocator counts what is held itself
        """Hold the caching allocator to ``limit`` bytes reserved: what a card that much smaller could give."""
        total = self._properties.total_memory
        read = getattr(self._cuda, "get_per_process_memory_fraction", lambda _: 1.0)  # torch 2.5 cannot tell; 1.0 is its default
        before = float(read(self._index))
        # torch multiplies by the total again and cuts off: half a byte more, or a limit of whole segments could lose its last one.
        self._cuda.set_per_process_memory_fraction(min((limit + 0.5) / total, before, 1.0), self._index)
        try:
            yield
        finally:
            self._cuda.set_per_process_memory_fraction(before, self._index)

    def reset_peaks(self) -> None:
        """Start the allocator's peaks again from what is held now."""
        self._cuda.reset_peak_memory_stats(self._index)

    def peak(self) -> Peak:
        """Return the allocator's highest figures since the last reset."""
        return Peak(allocated=self._cuda.max_memory_allocated(self._index), reserved=self._cuda.max_memory_reserved(self._index))

    def allocated(self) -> int:
        """Return the bytes in blocks that are handed out."""
        return int(self._cuda.memory_allocated(self._index))

    def retries(self) -> int | None:
        """Return how often cudaMalloc failed and was tried again after the cache was given back."""
        return int(self._cuda.memory_stats(self._index).get("num_alloc_retries", 0))

    def driver_used(self) -> int | None:
        """Return the bytes in use on the card: every process, contexts and libraries included."""
        free, total = self._cuda.mem_get_info(self._index)
        return int(total - free)

    def synchronize(self) -> None:
        """Wait for the card; an error of a kernel that was still running is raised here."""
        self._cuda.synchronize(self._index)

    def release(self) -> None:
        """Give the allocator's cache back to the driver."""
        # Emptying the cache synchronises and may itself run out; the next trial's own allocation then says so.
        with contextlib.suppress(RuntimeError):
            self._cuda.empty_cache()

    def classify(self, error: BaseException, *, ran_before: bool = False) -> Outcome | None:
        """Return the outcome ``error`` stands for."""
        return oom.classify(error, ran_before=ran_before)

    def environment(self) -> dict[str, str]:
        """Return the card, its compute capability and the versions that decide which kernels run."""
        import torch

        properties = self._properties
        facts = {
            "card": self.description,
            "compute capability": f"{properties.major}.{properties.minor}",
            "cuda": str(torch.version.cuda),
            "driver": self._card().driver,
        }
        return {key: value for key, value in facts.items() if value}

    def _card(self) -> CardUse:
        return self._nvml.card(self._uuid) if self._uuid else CardUse(notes=("this torch does not tell the card's UUID",))


def slice_of(index: int, environment: Mapping[str, str]) -> str:
    """Return the MIG slice that CUDA_VISIBLE_DEVICES names as card ``index``; empty where it names none.

    torch may tell a slice's UUID or its card's; the processes on the other slices of the card hold none of this one's memory.
    """
    named = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return named[index] if index < len(named) and named[index].startswith("MIG-") else ""


def driver_spills(system: str, release: str) -> bool:
    """Whether the driver moves what does not fit to host memory: on Windows, and in Linux under Windows (WSL)."""
    return system == "win32" or "microsoft" in release.lower()


def _checked(index: int | None, cuda: Any) -> int:
    if not cuda.is_available():
        raise DeviceUnavailable(
            "CUDA is not available: this torch was built without it, or there is no card or driver. Type nvidia-smi to see whether the "
            "driver is there, install a CUDA build of torch, or probe on the CPU with --device cpu (device='cpu')."
        )
    count = cuda.device_count()
    if index is None:
        return int(cuda.current_device())
    if not 0 <= index < count:
        here = ", ".join(f"cuda:{i} ({cuda.get_device_properties(i).name})" for i in range(count))
        raise DeviceUnavailable(f"There is no cuda:{index}: torch sees {count}, {here}. CUDA_VISIBLE_DEVICES may hide the others.")
    return index
