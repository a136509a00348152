"""Every byte of a model, an optimizer and the process, by name."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def everything(model: nn.Module, optimizer: Optimizer | None, *others: Any) -> dict[str, Any]:
    """Return what everything is, by name: bytes of tensors, identity of objects, values, switches and random states."""
    picture: dict[str, Any] = dict(_process())
    seen: dict[int, str] = {}
    for name, root in (("model", model), ("optimizer", optimizer), *((f"other {i}", other) for i, other in enumerate(others))):
        picture.update(_picture(name, root, seen))
    return picture


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs, by name."""
    return {n: (before.get(n, "-"), after.get(n, "-")) for n in {**before, **after} if before.get(n, "-") != after.get(n, "-")}


def _picture(name: str, value: Any, seen: dict[int, str]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (str, int, float, bool, bytes, type(None), torch.dtype, torch.device, type)):
        yield name, repr(value)
        return
    yield f"{name} is", (id(value), type(value))
    if id(value) in seen:
        return
    seen[id(value)] = name
    if isinstance(value, Tensor):
        yield from _tensor(name, value, seen)
    elif isinstance(value, np.ndarray):
        yield name, value.tobytes()
    elif (state := _generator(value)) is not None:
        yield name, state
    elif isinstance(value, dict):
        yield f"{name} keys", [id(key) if isinstance(key, Tensor) else repr(key) for key in value]
        for index, (key, held) in enumerate(value.items()):
            yield from _picture(f"{name}[{index if isinstance(key, Tensor) else key!r}]", held, seen)
    elif isinstance(value, (list, tuple, collections.deque)):
        yield f"{name} length", len(value)
        for index, held in enumerate(value):
            yield from _picture(f"{name}[{index}]", held, seen)
    elif isinstance(value, set):
        yield name, sorted(map(repr, value))
    if hasattr(value, "__dict__") and not callable(getattr(value, "__code__", None)) and type(value).__module__ != "builtins":
        for key, held in [*vars(value).items()]:
            yield from _picture(f"{name}.{key}", held, seen)
        yield f"{name} attributes", list(vars(value))


def _tensor(name: str, tensor: Tensor, seen: dict[int, str]) -> Iterator[tuple[str, Any]]:
    plain = tensor.detach()
    yield f"{name} bytes", hashlib.sha256(plain.to_dense().resolve_conj().contiguous().numpy().tobytes()).hexdigest()
    if tensor.layout is torch.strided:
        yield f"{name} place", (plain.data_ptr(), plain.shape, plain.stride(), plain.storage_offset(), plain.untyped_storage().nbytes())
    yield f"{name} kind", (plain.dtype, plain.device, tensor.requires_grad, tensor.is_leaf)
    hooks = [tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)]
    yield f"{name} hooks", [None if table is None else {key: id(hook) for key, hook in table.items()} for table in hooks]
    if tensor.is_leaf:
        yield from _picture(f"{name}.grad", tensor.grad, seen)


def _generator(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    return repr(value.bit_generator.state) if isinstance(value, np.random.Generator) else None


def _process() -> Iterator[tuple[str, Any]]:
    """Switches and random states of the process, read by their public names."""
    yield "python random state", random.getstate()
    yield "numpy random state", repr(np.random.get_state())
    yield "torch random state", torch.get_rng_state().numpy().tobytes()
    yield "grad mode", torch.is_grad_enabled()
    yield "dtype, device", (torch.get_default_dtype(), torch.get_default_device())
    yield "deterministic", (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    yield "anomaly", (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled())
    yield "threads", torch.get_num_threads()
    yield "autocast", [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    yield "autocast cache", torch.is_autocast_cache_enabled()
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    yield "cudnn", (cudnn.enabled, cudnn.benchmark, cudnn.deterministic)
    yield "half sums", (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction)
    with contextlib.suppress(RuntimeError):
        yield "tf32", (torch.get_float32_matmul_precision(), cudnn.allow_tf32, matmul.allow_tf32)
    yield "attention", (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
    yield "mkldnn", torch.backends.mkldnn.enabled
    yield "fill", torch.utils.deterministic.fill_uninitialized_memory
    with contextlib.suppress(ImportError):
        import resource

        yield "limit on address space", resource.getrlimit(resource.RLIMIT_AS)
