"""A small card played in Python: a fraction, a cache, peaks, and NVML as drivers really answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from autobatch.core.units import GIB


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
