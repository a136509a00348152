"""autobatch: the largest batch size that provably fits, found by running it.

Names are resolved on first use, so that importing the package loads neither torch nor pynvml.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from autobatch._version import __version__ as __version__

if TYPE_CHECKING:
    from autobatch.core.errors import AutobatchError as AutobatchError
    from autobatch.core.errors import DeviceUnavailable as DeviceUnavailable
    from autobatch.core.errors import InvalidRequest as InvalidRequest
    from autobatch.core.errors import NoBatchSizeFits as NoBatchSizeFits
    from autobatch.core.errors import WorkerFailed as WorkerFailed
    from autobatch.core.errors import WorkloadFailed as WorkloadFailed
    from autobatch.core.noise_scale import NoiseScale as NoiseScale
    from autobatch.core.plan import BatchPlan as BatchPlan
    from autobatch.core.records import MemoryReading as MemoryReading
    from autobatch.core.records import Outcome as Outcome
    from autobatch.core.records import Peak as Peak
    from autobatch.core.records import Probe as Probe
    from autobatch.core.records import Setting as Setting
    from autobatch.core.records import Trying as Trying
    from autobatch.core.scaling import Scaled as Scaled
    from autobatch.core.schedule import Ramp as Ramp
    from autobatch.estimator import estimate as estimate
    from autobatch.finder import find as find
    from autobatch.finder import search as search
    from autobatch.training.noise_scale import NoiseMeter as NoiseMeter
    from autobatch.training.noise_scale import noise_scale as noise_scale
    from autobatch.training.resilient import resilient as resilient
    from autobatch.workload.workload import Workload as Workload
    from autobatch.workload.workload import build_workload as build_workload

_HOMES = {
    "AutobatchError": "autobatch.core.errors",
    "BatchPlan": "autobatch.core.plan",
    "DeviceUnavailable": "autobatch.core.errors",
    "InvalidRequest": "autobatch.core.errors",
    "MemoryReading": "autobatch.core.records",
    "NoBatchSizeFits": "autobatch.core.errors",
    "NoiseMeter": "autobatch.training.noise_scale",
    "NoiseScale": "autobatch.core.noise_scale",
    "Outcome": "autobatch.core.records",
    "Peak": "autobatch.core.records",
    "Probe": "autobatch.core.records",
    "Ramp": "autobatch.core.schedule",
    "Scaled": "autobatch.core.scaling",
    "Setting": "autobatch.core.records",
    "Trying": "autobatch.core.records",
    "WorkerFailed": "autobatch.core.errors",
    "Workload": "autobatch.workload.workload",
    "WorkloadFailed": "autobatch.core.errors",
    "build_workload": "autobatch.workload.workload",
    "estimate": "autobatch.estimator",
    "find": "autobatch.finder",
    "noise_scale": "autobatch.training.noise_scale",
    "resilient": "autobatch.training.resilient",
    "search": "autobatch.finder",
}

__all__ = sorted(["__version__", *_HOMES])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autobatch' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
