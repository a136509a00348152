"""From ``find``'s arguments to a prober, in this process or in a worker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from autobatch.core.errors import InvalidRequest
from autobatch.devices import device_type, open_device
from autobatch.probe.inline import InlineProber
from autobatch.probe.worker import WorkerProber
from autobatch.simulate.foresight import foreseeing
from autobatch.workload.batches import shortened
from autobatch.workload.state import keep_random_state
from autobatch.workload.workload import build_workload


@contextlib.contextmanager
def open_prober(
    what: Mapping[str, Any], where: Mapping[str, Any], *, isolate: bool | None, probe_timeout: float, time_limit: float | None
) -> Iterator[InlineProber | WorkerProber]:
    """Give a prober for the training step ``what`` on the device ``where``, and put everything back after it.

    Args:
        what: ``build_workload``'s arguments.
        where: ``device``, ``memory_budget`` and ``margin``.
        isolate: whether in a worker; ``None`` for the device's own way, which is a worker on the CPU.
        probe_timeout: seconds one probe may take in a worker.
        time_limit: seconds for the whole search, which a worker keeps also in the middle of a probe.

    Raises:
        AutobatchError: device, budget or workload cannot be had, or the workload cannot be sent to a worker.
    """
    in_worker = device_type(where["device"]) == "cpu" if isolate is None else isolate
    with keep_random_state():
        device = None if in_worker else open_device(where["device"])
        sample = shortened(what["sample"], what["make_batch"] is not None)
        workload = build_workload(**{**what, "sample": sample})  # for a worker too: a mistake is told before a process is started
        prober: InlineProber | WorkerProber
        if device is not None:
            with foreseeing(workload, device.capability) as foreseen:
                prober = InlineProber(workload, device, **_budget(where), foreseen=foreseen)
        else:
            name = None if where["device"] is None else str(where["device"])
            payload = _packed({**what, "sample": sample})
            options = {**where, "device": name}
            prober = WorkerProber(payload=payload, options=options, probe_timeout=probe_timeout, time_limit=time_limit)
        with contextlib.closing(prober):
            yield prober


def _budget(where: Mapping[str, Any]) -> dict[str, Any]:
    return {key: where[key] for key in ("memory_budget", "margin")}


def _packed(what: Mapping[str, Any]) -> bytes:
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps(dict(what)))
    except Exception as error:
        raise InvalidRequest(
            f"The workload cannot be sent to a worker process ({type(error).__name__}: {error}). Probe in this process with "
            "isolate=False, or let the worker build it: autobatch probe path/to/train.py:build."
        ) from error
