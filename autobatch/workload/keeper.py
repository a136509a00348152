"""Objects as they are now, with everything they hold, put back in place: containers, attributes, tensors to the byte, generators."""

from __future__ import annotations

import collections
import copyreg
import functools
import sys
import types
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import Dataset

from autobatch.workload.randomness import generator_undo, generators
from autobatch.workload.undo import (
    Undo,
    array_undo,
    bytes_undo,
    fill,
    is_array,
    is_filled,
    lazy_undo,
    parts,
    put_bytes,
    sequence_undo,
    set_undo,
    table_undo,
    tensor_undo,
)

_ATOMS = (str, bytes, int, float, complex, type, types.ModuleType, types.NoneType, types.BuiltinFunctionType)
# Parts of torch whose objects hold what training changes. The others are the machinery of this process: compilers, process groups.
_TORCH = ("torch.nn.", "torch.optim.", "torch.amp.", "torch.cuda.amp.", "torch.utils.data.", "torch.ao.", "torch.testing.")
# Held by what works together with other threads, processes or the system; such an object cannot be put back from outside.
_SHARED = ("_thread", "threading", "queue", "_queue", "multiprocessing", "socket", "_io", "io", "subprocess", "asyncio", "concurrent")


class Keeper:
    """Takes objects as they are and puts them back; what did not change is not touched.

    Args:
        untouched: ids of tensors whose bytes nobody will write to.
        copies: whether bytes are copied; without, objects alone are put back.
    """

    def __init__(self, untouched: Collection[int] = (), *, copies: bool = True) -> None:
        self._untouched, self._copies = untouched, copies
        self._undo: list[Undo] = []
        self._seen: dict[int, Any] = {}
        self._spans: dict[tuple[int, int, int], tuple[Tensor, Tensor, int]] = {}

    def take(self, *roots: Any) -> None:
        """Take ``roots`` and all that is reached from them."""
        todo = list(roots)
        while todo:
            value = todo.pop()
            if not isinstance(value, _ATOMS) and id(value) not in self._seen:
                self._seen[id(value)] = value
                todo.extend(self._take(value))

    def restore(self) -> None:
        """Put everything back; what cannot be is told after the rest has been."""
        errors = []
        with torch.no_grad():
            undos: list[Undo] = [*reversed(self._undo), *(functools.partial(put_bytes, *span) for span in self._spans.values())]
            for undo in undos:
                try:
                    undo()
                except Exception as error:  # noqa: BLE001 told below, after the rest has been put back
                    errors.append(error)
        self._undo.clear()
        self._spans.clear()
        self._seen.clear()
        if errors:
            raise errors[0]

    def _take(self, value: Any) -> Iterable[Any]:
        """Take one object; return what it holds."""
        if isinstance(value, Tensor):
            return self._take_tensor(value)
        generator = generator_undo(value) if self._copies else None
        if generator is not None:
            self._undo.append(generator)
            return ()
        if isinstance(value, Dataset):
            return list(generators(value))  # rows are read, not changed
        if isinstance(value, torch.jit.ScriptModule):
            return self._take_script(value)
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            return self._take_function(value)
        return [*self._take_container(value), *self._take_attributes(value)]

    def _take_container(self, value: Any) -> Iterable[Any]:
        if isinstance(value, dict):
            self._undo.append(table_undo(value))
            return [*value.keys(), *value.values()]
        if isinstance(value, (list, collections.deque)):
            self._undo.append(sequence_undo(value))
            return list(value)
        if isinstance(value, set):
            self._undo.append(set_undo(value))
            return list(value)
        if isinstance(value, bytearray):
            self._undo.append(bytes_undo(value))
        elif self._copies and is_array(value):
            self._undo.append(array_undo(value))
        return list(value) if isinstance(value, (tuple, frozenset)) else ()

    def _take_attributes(self, value: Any) -> Iterable[Any]:
        if not _is_ours_to_put_back(value):
            return ()
        table = getattr(value, "__dict__", {})
        slots = {name: getattr(value, name) for name in copyreg._slotnames(type(value)) if hasattr(value, name)}  # type: ignore[attr-defined]
        if any(_root(type(held)) in _SHARED for held in (*table.values(), *slots.values())):
            return ()
        kind = type(value)

        def undo() -> None:
            if type(value) is not kind:  # a parametrization makes a class of its own
                value.__class__ = kind
            for name in copyreg._slotnames(kind):  # type: ignore[attr-defined]
                if name in slots and getattr(value, name, None) is not slots[name]:
                    object.__setattr__(value, name, slots[name])
                elif name not in slots and hasattr(value, name):
                    object.__delattr__(value, name)

        self._undo.append(undo)
        self._undo.append(table_undo(table))
        return [*table.values(), *slots.values()]

    def _take_function(self, function: Any) -> Iterable[Any]:
        if isinstance(function, types.MethodType):
            return function.__self__, function.__func__
        if isinstance(function, functools.partial):
            return function.func, function.args, function.keywords
        if _root(function) in sys.stdlib_module_names or (_root(function) == "torch"):
            return ()
        held = [function.__defaults__, function.__kwdefaults__]
        for cell in function.__closure__ or ():
            content = [cell.cell_contents] if is_filled(cell) else []
            self._undo.append(functools.partial(fill, cell, content))
            held += content
        self._undo.append(table_undo(vars(function)))
        return [*held, *vars(function).values()]

    def _take_script(self, module: Any) -> Iterable[Any]:
        for part in module.modules():
            self._undo.append(functools.partial(_set_mode, part, part.training))
        return [*module.parameters(), *module.buffers()]

    def _take_tensor(self, tensor: Tensor) -> Iterable[Any]:
        if is_lazy(tensor):
            self._undo.append(lazy_undo(tensor))
            return ()
        self._undo.append(tensor_undo(tensor))
        held = [vars(tensor), tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)]
        if tensor.is_leaf and not isinstance(tensor, nn.Parameter):
            held.append(tensor.grad)
        if is_traceable_wrapper_subclass(tensor):
            held += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        elif self._copies and id(tensor) not in self._untouched and not tensor.is_meta:
            for part in parts(tensor):
                self._take_bytes(part)
        return held

    def _take_bytes(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            alias, copy = tensor.detach(), tensor.detach().clone()  # oneDNN's own, on the CPU
            self._undo.append(lambda: alias.copy_(copy))
            return
        storage = tensor.untyped_storage()
        size = tensor.element_size()
        steps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        start, length = int(tensor.storage_offset()) * size, (steps + 1) * size if tensor.numel() else 0
        key = (storage._cdata, start, length)
        if length and key not in self._spans:
            # As bytes: a tensor may be expanded, a view with holes, conjugated, quantized, or not allowed to be written to.
            span = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, start, (length,), (1,))
            self._spans[key] = (span, span.to("cpu", copy=True), storage.nbytes())


def _set_mode(module: Any, training: bool) -> None:
    if module.training != training:
        module.training = training


def _root(of: Any) -> str:
    return str(getattr(of, "__module__", "")).partition(".")[0]


def _is_ours_to_put_back(value: Any) -> bool:
    """Whether the attributes of ``value`` are state of the training step: not the interpreter's, not a stream's that moves on."""
    if isinstance(value, (nn.Module, torch.optim.Optimizer)):
        return True
    kind = type(value)
    if hasattr(kind, "__next__") or _root(kind) in sys.stdlib_module_names or _root(kind) == "numpy":
        return False
    return _root(kind) != "torch" or f"{kind.__module__}.".startswith(_TORCH)
