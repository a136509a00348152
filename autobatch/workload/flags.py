"""Switches of the process and the thread that a training step may turn: read before the first trial, put back after the last."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimizers

Undo = Callable[[], object]
_Switch = tuple[str, Callable[[], Any], Callable[[Any], object]]

# Attributes of these modules of torch are switches; what a version of torch does not have is passed over.
_ATTRIBUTES = (
    ("backends.cudnn", ("enabled", "benchmark", "benchmark_limit", "deterministic")),
    (
        "backends.cuda.matmul",
        ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation"),
    ),
    ("backends.mkldnn", ("enabled", "deterministic")),
    ("backends.opt_einsum", ("enabled", "strategy")),
    ("backends.quantized", ("engine",)),
    ("utils.deterministic", ("fill_uninitialized_memory",)),
)
# Since torch 2.9 precision is set by names, and reading the older switches raises where both were used.
_PRECISIONS = [
    *(("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn")),
    *(("mkldnn", "all"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn")),
]
_OLD_PRECISIONS = (("backends.cudnn", ("allow_tf32",)), ("backends.cuda.matmul", ("allow_tf32",)))
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")
_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


def flags_undo() -> list[Undo]:
    """Return functions that put every switch back as it is now; one that was not turned is not touched."""
    return [undo for _, read, write in switches() if (undo := _undo(read, write)) is not None]


def switches() -> Iterator[_Switch]:
    """Yield every switch as its name, what reads it and what sets it."""
    yield "default dtype", torch.get_default_dtype, torch.set_default_dtype
    yield "default device", _default_device, torch.set_default_device
    yield "grad mode", torch.is_grad_enabled, torch._C._set_grad_enabled
    yield "anomaly mode", _anomaly, lambda pair: torch.set_anomaly_enabled(*pair)
    yield "deterministic algorithms", _deterministic, lambda pair: torch.use_deterministic_algorithms(pair[0], warn_only=pair[1])
    yield "threads", torch.get_num_threads, torch.set_num_threads
    yield "warn always", torch.is_warn_always_enabled, torch.set_warn_always
    yield "autograd threads", torch._C._is_multithreading_enabled, torch._C._set_multithreading_enabled
    yield "autocast cache", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled
    yield "autocast nesting", _nesting, _set_nesting
    yield "current CUDA device", _current_device, _set_current_device
    yield from _autocast()
    yield from _attributes(*_ATTRIBUTES)
    yield from _precisions()
    for name in _ATTENTION:
        cuda = torch.backends.cuda
        yield f"{name} attention", getattr(cuda, f"{name}_sdp_enabled"), getattr(cuda, f"enable_{name}_sdp")
    yield from _global_hooks()


def _undo(read: Callable[[], Any], write: Callable[[Any], object]) -> Undo | None:
    try:
        before = read()
    except (RuntimeError, AttributeError, AssertionError):
        return None  # this build of torch has no such switch, or it was set by two

    def undo() -> None:
        try:
            turned = read() != before
        except RuntimeError:
            turned = True  # torch refuses to read a precision that was set by two switches
        if turned:
            write(before)

    return undo


def _default_device() -> torch.device | None:
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return context.device if context is not None else None


def _anomaly() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _nesting() -> int:
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def _set_nesting(depth: int) -> None:
    while torch.autocast_decrement_nesting() > depth:
        pass
    if depth == 0:
        torch.clear_autocast_cache()


def _current_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]


def _set_current_device(index: int | None) -> None:  # pragma: no cover: needs two cards
    if index is not None:
        torch.cuda.set_device(index)


def _autocast() -> Iterator[_Switch]:
    for kind in _AUTOCAST_DEVICES:
        yield (
            f"autocast on {kind}",
            lambda kind=kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),  # type: ignore[misc]
            lambda pair, kind=kind: _set_autocast(kind, *pair),  # type: ignore[misc]
        )


def _set_autocast(kind: str, enabled: bool, dtype: torch.dtype) -> None:
    torch.set_autocast_enabled(kind, enabled)
    torch.set_autocast_dtype(kind, dtype)


def _attributes(*tables: tuple[str, tuple[str, ...]]) -> Iterator[_Switch]:
    for path, names in tables:
        holder: Any = torch
        for part in path.split("."):
            holder = getattr(holder, part)
        for name in names:
            with contextlib.suppress(RuntimeError, AttributeError, AssertionError):
                getattr(holder, name)
                yield (
                    f"{path}.{name}",
                    lambda holder=holder, name=name: getattr(holder, name),  # type: ignore[misc]
                    lambda value, holder=holder, name=name: setattr(holder, name, value),  # type: ignore[misc]
                )


def _precisions() -> Iterator[_Switch]:
    read = getattr(torch._C, "_get_fp32_precision_getter", None)
    if read is None:  # pragma: no cover: torch before 2.9
        yield from _attributes(*_OLD_PRECISIONS)
        yield "float32 matmul precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
        return
    write = torch._C._set_fp32_precision_setter
    # The older switches write to the newer ones, and cannot be read while the two differ: they come before and after.
    yield "float32 matmul precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    yield from _attributes(*_OLD_PRECISIONS)
    for backend, operators in _PRECISIONS:
        yield (
            f"precision of {backend} {operators}",
            lambda backend=backend, operators=operators: read(backend, operators),  # type: ignore[misc]
            lambda value, backend=backend, operators=operators: write(backend, operators, value),  # type: ignore[misc]
        )
    yield "float32 matmul precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    yield from _attributes(*_OLD_PRECISIONS)


def _global_hooks() -> Iterator[_Switch]:
    """Hooks on every module and every optimizer of the process."""
    for holder in (modules, optimizers):
        for name, table in vars(holder).items():
            if name.startswith("_global_") and isinstance(table, dict):
                yield name, table.copy, lambda value, table=table: (table.clear(), table.update(value))  # type: ignore[misc]
