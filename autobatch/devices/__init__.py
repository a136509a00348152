"""What memory is on each kind of hardware."""

from __future__ import annotations

from typing import Any

from autobatch.core.errors import DeviceUnavailable
from autobatch.devices.base import Device


def open_device(device: Any = None) -> Device:
    """Return the device by torch's name for it (``"cuda"``, ``"cuda:1"``, ``"cpu"``); by default the current GPU, else the CPU.

    Raises:
        DeviceUnavailable: there is no such device here, or its memory cannot be held to a limit.
    """
    parsed = _parsed(device)
    if parsed.type == "cpu":
        from autobatch.devices.cpu import CpuDevice

        return CpuDevice()
    if parsed.type == "cuda":
        from autobatch.devices.cuda import CudaDevice

        return CudaDevice(parsed.index)
    raise DeviceUnavailable(
        f"autobatch cannot hold {parsed.type!r} memory to a limit yet. Known devices: cuda, cpu. For a loop of your own on "
        f"{parsed.type}, autobatch.search(run) works by out-of-memory errors alone."
    )


def device_type(device: Any = None) -> str:
    """Return what kind of device the name stands for, ``"cpu"`` or ``"cuda"``, whether or not there is one.

    Raises:
        DeviceUnavailable: it is no name of a device.
    """
    return str(_parsed(device).type)


def device_names() -> list[str]:
    """Return torch's names of the devices here that autobatch can probe on."""
    import torch

    return [*(f"cuda:{index}" for index in range(torch.cuda.device_count())), "cpu"]


def _parsed(device: Any) -> Any:
    import torch

    if device is None:
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise DeviceUnavailable(f"{device!r} is no device. Known here: cuda, cuda:0 and so on, cpu.") from None
