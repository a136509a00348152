"""One object as it is now: functions that put a container, a tensor, an array or a closed-over variable back in place."""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Undo = Callable[[], object]


def tensor_undo(tensor: Tensor) -> Undo:
    """Return a function that gives ``tensor`` back where its numbers lie, its gradient, its hooks and whether it wants a gradient."""
    alias, leaf, wanted = tensor.data, tensor.is_leaf, tensor.requires_grad
    gradient = tensor.grad if leaf else None
    own: Any = tensor
    hooks, later = own._backward_hooks, getattr(own, "_post_accumulate_grad_hooks", None)
    before = _place(tensor)

    def undo() -> None:
        if leaf and not tensor.is_leaf:
            tensor.detach_()
        if _place(tensor) != before:
            tensor.grad = None
            tensor.data = alias
        if leaf and tensor.grad is not gradient:
            tensor.grad = gradient
        if leaf and tensor.requires_grad != wanted:
            tensor.requires_grad_(wanted)
        for name, table in (("_backward_hooks", hooks), ("_post_accumulate_grad_hooks", later)):
            now = getattr(own, name, None)
            if now is not table:
                if now:
                    now.clear()  # autograd goes on to call what is in it
                setattr(own, name, table)

    return undo


def lazy_undo(tensor: Tensor) -> Undo:
    """Return a function that makes ``tensor``, a parameter or buffer without a shape yet, that again."""
    kind, alias = type(tensor), tensor.data

    def undo() -> None:
        if type(tensor) is not kind:
            tensor.grad = None
            tensor.data = alias
            tensor.__class__ = kind

    return undo


def parts(tensor: Tensor) -> list[Tensor]:
    """Return the tensors in which the numbers of ``tensor`` lie: itself, those it is made of, or a sparse one's numbers and places."""
    if is_traceable_wrapper_subclass(tensor):
        return [part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))]
    plain = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        return [plain._indices(), plain._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [plain.crow_indices(), plain.col_indices(), plain.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [plain.ccol_indices(), plain.row_indices(), plain.values()]
    return [plain]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return where and how the numbers of ``tensor`` lie; for a tensor made of others, only what kind it is."""
    kind = (tensor.dtype, tensor.device, tensor.layout, tensor.shape)
    if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return kind
    return *kind, tensor.stride(), tensor.storage_offset(), tensor.untyped_storage()._cdata


def put_bytes(span: Tensor, copy: Tensor, nbytes: int) -> None:
    """Write ``copy`` into ``span`` of a storage that was ``nbytes`` large."""
    storage = span.untyped_storage()
    if storage.nbytes() != nbytes:
        storage.resize_(nbytes)
    span.copy_(copy)


def table_undo(table: dict[Any, Any]) -> Undo:
    """Return a function that gives ``table`` the entries it has now, in their order."""
    entries = list(table.items())
    kind: Any = collections.OrderedDict if isinstance(table, collections.OrderedDict) else dict

    def undo() -> None:
        now = list(table.items())
        if len(now) != len(entries) or any(k is not key or v is not value for (k, v), (key, value) in zip(now, entries, strict=True)):
            # Not the methods of a class derived from it, which may do more.
            kind.clear(table)
            kind.update(table, entries)

    return undo


def sequence_undo(value: Any) -> Undo:
    """Return a function that gives the list or deque ``value`` the entries it has now."""
    entries = list(value)

    def undo() -> None:
        if len(value) != len(entries) or any(a is not b for a, b in zip(value, entries, strict=True)):
            value.clear()
            value.extend(entries)

    return undo


def bytes_undo(value: bytearray) -> Undo:
    """Return a function that gives ``value`` the bytes it has now, in place: a tensor or an array may lie in its memory."""
    entries = bytes(value)

    def undo() -> None:
        if value != entries:
            value[:] = entries

    return undo


def set_undo(value: set[Any]) -> Undo:
    """Return a function that gives ``value`` the entries it has now."""
    entries = set(value)

    def undo() -> None:
        if {id(entry) for entry in value} != {id(entry) for entry in entries}:
            value.clear()
            value.update(entries)

    return undo


def is_array(value: Any) -> bool:
    """Whether ``value`` is an array of NumPy in memory."""
    return isinstance(value, np.ndarray) and not isinstance(value, np.memmap)


def array_undo(array: Any) -> Undo:
    """Return a function that writes the numbers of ``array`` back."""
    entries, writeable = array.copy(), array.flags.writeable

    def undo() -> None:
        if writeable or array.flags.writeable:
            array.flags.writeable = True
            array[...] = entries
            array.flags.writeable = writeable

    return undo


def is_filled(cell: types.CellType) -> bool:
    """Whether a variable that a function has closed over has a value."""
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def fill(cell: types.CellType, content: list[Any]) -> None:
    """Give a variable that a function has closed over its value back, or none."""
    if content:
        cell.cell_contents = content[0]
    elif is_filled(cell):
        del cell.cell_contents
