"""NVIDIA's management library: who else holds a card's memory. The only importer of pynvml (PyPI's ``nvidia-ml-py``).

NVML numbers cards as the bus does and knows nothing of CUDA_VISIBLE_DEVICES, so cards are matched by UUID. Whatever it cannot tell (no
library, no permission, a MIG slice, WSL) becomes a note: nothing here raises.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from autobatch.core.records import ProcessMemory

WITHOUT = "NVML is not available ({}), so memory held by other processes is known in sum only"


@dataclass(frozen=True, slots=True, kw_only=True)
class CardUse:
    """What NVML says of one card.

    Attributes:
        others: other processes that hold memory, largest first.
        used: bytes in use on the whole card, ``None`` when not told.
        driver: version of the driver, empty when not told.
        notes: what could not be told, and why.
    """

    others: tuple[ProcessMemory, ...] = ()
    used: int | None = None
    driver: str = ""
    notes: tuple[str, ...] = ()


class Nvml:
    """NVML, opened for one question at a time.

    Args:
        library: the module to call; by default pynvml, imported at the first question.
    """

    def __init__(self, library: Any = None) -> None:
        self._library = library

    def card(self, uuid: str) -> CardUse:
        """Return the use of the card, or MIG slice, with this UUID (with or without its ``GPU-`` or ``MIG-`` prefix)."""
        try:
            library = self._load()
            library.nvmlInit()
        except Exception as error:  # noqa: BLE001 a missing driver shows as any of several errors, all with the same meaning
            return CardUse(notes=(WITHOUT.format(_reason(error)),))
        try:
            return self._read(library, uuid)
        finally:
            library.nvmlShutdown()

    def _load(self) -> Any:
        if self._library is None:
            import pynvml

            self._library = pynvml
        return self._library

    def _read(self, library: Any, uuid: str) -> CardUse:
        try:
            handle = self._handle(library, uuid)
        except library.NVMLError as error:
            return CardUse(notes=(WITHOUT.format(f"it does not know the card {uuid}: {_reason(error)}"),))
        notes: list[str] = []

        def told(what: str, question: Any) -> Any:
            try:
                return question()
            except library.NVMLError as error:
                notes.append(f"NVML does not tell {what}: {_reason(error)}")
                return None

        running = told("the card's processes", lambda: library.nvmlDeviceGetComputeRunningProcesses(handle)) or []
        memory = told("the card's memory", lambda: library.nvmlDeviceGetMemoryInfo(handle))
        driver = told("the driver's version", library.nvmlSystemGetDriverVersion) or ""
        others = [
            ProcessMemory(pid=process.pid, name=_program(process.pid), used=process.usedGpuMemory)
            for process in running
            if process.pid != os.getpid()
        ]
        return CardUse(
            others=tuple(sorted(others, key=lambda other: -(other.used or 0))),
            used=None if memory is None else int(memory.used),
            driver=driver.decode() if isinstance(driver, bytes) else driver,
            notes=tuple(notes),
        )

    def _handle(self, library: Any, uuid: str) -> Any:
        """Return NVML's handle; torch writes UUIDs without the prefix that NVML wants."""
        if uuid.startswith(("GPU-", "MIG-")):
            return library.nvmlDeviceGetHandleByUUID(uuid.encode())
        try:
            return library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
        except library.NVMLError:
            return library.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}".encode())


def _reason(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__


def _program(pid: int) -> str:
    """Return the program's name, empty when the process is another container's or has ended."""
    import psutil

    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return ""
