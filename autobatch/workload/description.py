"""What a training step is, as plain JSON values: two steps with equal descriptions need the same memory.

Code counts by its bytecode and by what it refers to, not by its comments or its place in a file; installed packages count by their version.
Tensors count by shape, not by value.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import importlib.metadata
import json
import random
import sys
import sysconfig
import types
import weakref
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from autobatch.workload.batches import map_tensors, shortened
from autobatch.workload.flags import switches
from autobatch.workload.randomness import keep_random_state

# More than this is data rather than a description; the largest language models of transformers have a tenth.
_MOST = 200_000
_PLAIN = (type(None), bool, int, float, str)
_BY_NAME = (
    *(types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType, types.ClassMethodDescriptorType),
)
_BY_TEXT = (complex, range, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
# A random state does not change how much memory a step takes.
_BY_KIND = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_OURS = str(Path(__file__).parents[1])


class Undescribable(Exception):
    """Something in a training step cannot be told from another thing like it; the message names it."""


def describe_step(what: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return the description of a training step, and its sample as it was read for it: a stream of data is read only once.

    Args:
        what: ``build_workload``'s arguments.

    Raises:
        InvalidRequest: the sample cannot be meant.
        Undescribable: the step has a part that no description can hold.
    """
    with keep_random_state(what["sample"]):
        sample = shortened(what["sample"], what["make_batch"] is not None)
    row = map_tensors(sample.value, lambda leaf: leaf[:1])
    parts = {**what, "sample": {"row": row, "dataset_size": sample.dataset_size, "feeding": str(sample.feeding)}, "switches": _switches()}
    return describe(parts), sample


def describe(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``parts`` are as plain JSON values, each under its name.

    Raises:
        Undescribable: a part holds what cannot be pickled either, is too large, or fails when it is asked.
    """
    describer = _Describer()
    try:
        return {name: describer.of(value, name) for name, value in parts.items()}
    except RecursionError:
        raise Undescribable("it is nested too deeply") from None


def _switches() -> dict[str, Any]:
    found = {}
    for name, read, _ in switches():
        if name != "current CUDA device":
            try:
                found[name] = read()
            except (RuntimeError, AttributeError, AssertionError):
                continue  # this build of torch has no such switch
    return found


class _Describer:
    """Describes values; one that comes again is told by its number, so that what is tied or in a circle stays so."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # an id is good only as long as its object lives

    def of(self, value: Any, where: str) -> Any:
        """Return what ``value`` is, which lies at ``where``."""
        if type(value) in _PLAIN:
            return value
        if type(value) is tuple:
            return ["tuple", *self._items(value, where)]
        if id(value) in self._seen:
            return ["again", self._seen[id(value)]]
        self._seen[id(value)] = len(self._alive)
        self._alive.append(value)
        if len(self._alive) > _MOST:
            raise Undescribable(f"{where} lies among more than {_MOST:,} objects")
        return self._new(value, where)

    def _items(self, values: Any, where: str) -> list[Any]:
        return [self.of(item, f"{where}[{index}]") for index, item in enumerate(values)]

    def _new(self, value: Any, where: str) -> Any:
        kind = type(value)
        if kind is list:
            return self._items(value, where)
        if kind is dict:
            return {"dict": [[self.of(key, where), self.of(item, f"{where}[{key!r}]")] for key, item in value.items()]}
        if isinstance(value, (set, frozenset)):
            return [_name(kind), *sorted((self.of(item, where) for item in value), key=json.dumps)]
        if isinstance(value, Enum):
            return [_name(kind), value.name]
        if isinstance(value, (bytes, bytearray)):
            return ["bytes", hashlib.sha256(value).hexdigest()]
        if isinstance(value, _BY_TEXT):
            return [_name(kind), str(value)]
        if isinstance(value, _BY_NAME):
            return ["builtin", getattr(value, "__module__", None), value.__qualname__]
        if isinstance(value, _BY_KIND):
            return ["random", _name(kind)]
        return self._compound(value, where)

    def _compound(self, value: Any, where: str) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray):
            return ["array", str(value.dtype), list(value.shape)]
        if isinstance(value, nn.Module):
            return self._module(value, where)
        if isinstance(value, types.FunctionType):
            return self._function(value, where)
        if isinstance(value, types.MethodType):
            return ["method", self.of(value.__func__, where), self.of(value.__self__, where)]
        if isinstance(value, types.CodeType):
            return self._code(value, where)
        if isinstance(value, type):
            return self._class(value, where)
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__, _version_or_hash(value)]
        return self._wrapper(value, where)

    def _wrapper(self, value: Any, where: str) -> Any:
        if isinstance(value, (staticmethod, classmethod)):
            return [type(value).__name__, self.of(value.__func__, where)]
        if isinstance(value, property):
            return ["property", *self._items((value.fget, value.fset, value.fdel), where)]
        if isinstance(value, functools.cached_property):
            return ["cached property", self.of(value.func, where)]
        if isinstance(value, weakref.ref):
            return ["weak", self.of(value(), where)]
        return self._object(value, where)

    def _tensor(self, value: torch.Tensor) -> list[Any]:
        shape = None if is_lazy(value) else list(value.shape)
        facts = [str(value.dtype), str(value.layout), value.device.type, value.requires_grad]
        return [_name(type(value)), shape, *facts, value.is_leaf and value.grad is not None]

    def _module(self, value: nn.Module, where: str) -> list[Any]:
        # Hooks are numbered through the whole process; their order is what counts.
        state = {key: list(item.values()) if "hooks" in key and isinstance(item, dict) else item for key, item in vars(value).items()}
        return ["nn", self.of(type(value), where), {key: self.of(item, _under(where, key)) for key, item in state.items()}]

    def _function(self, value: types.FunctionType, where: str) -> Any:
        installed = _is_installed(value.__code__.co_filename)
        if installed and not value.__closure__:
            return ["function", _name(value)]
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        inner = [value.__defaults__, value.__kwdefaults__, cells, vars(value)]
        described = ["function", _name(value), *(self.of(part, where) for part in inner)]
        if installed:
            return described
        used = {name: value.__globals__[name] for name in sorted(_names(value.__code__)) if name in value.__globals__}
        return [*described, self._code(value.__code__, where), {name: self.of(item, f"{where}: {name}") for name, item in used.items()}]

    def _code(self, code: types.CodeType, where: str) -> list[Any]:
        names = [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
        shape = [code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount]
        return [
            code.co_code.hex(),
            *(list(part) for part in names),
            *shape,
            getattr(code, "co_exceptiontable", b"").hex(),
            *self._items(code.co_consts, where),
        ]

    def _class(self, value: type, where: str) -> Any:
        if _is_installed(_file_of(value)):
            return ["class", _name(value)]
        members = {
            name: self.of(member, _under(where, name))
            for name, member in sorted(vars(value).items())
            if isinstance(member, (types.FunctionType, staticmethod, classmethod)) or not (name.startswith("__") or name == "_abc_impl")
        }
        return ["class", _name(value), [self.of(base, where) for base in value.__bases__], members]

    def _object(self, value: Any, where: str) -> Any:
        """Return what ``value`` tells pickle of itself, which is all that makes it what it is."""
        try:
            known: Any = copyreg.dispatch_table.get(type(value))
            reduced = value.__reduce_ex__(4) if known is None else known(value)
        except Exception as error:  # noqa: BLE001 whatever the user's object does when it is asked
            raise Undescribable(
                f"{where} is a {type(value).__name__}, which cannot be described ({type(error).__name__}: {error})"
            ) from None
        if isinstance(reduced, str):
            return ["global", getattr(value, "__module__", None), reduced]
        make, arguments, *rest = reduced
        state, *contents = (*rest, None, None, None)[:3]
        listed = [None if part is None else list(part) for part in contents]
        return ["object", *(self.of(part, _under(where, "")) for part in (make, arguments, state, *listed))]


def _under(where: str, name: str) -> str:
    return f"{where}.{name}" if name else where


def _name(value: Any) -> str:
    """Return the full name of a class or a function, with its package's version when it is installed."""
    module = value.__module__ or ""
    return f"{module}.{value.__qualname__} {_version(module.partition('.')[0])}".rstrip()


def _names(code: types.CodeType) -> set[str]:
    """Return the names that ``code`` and the functions inside it look up."""
    return {*code.co_names}.union(*(_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that has no value yet
        return False


def _file_of(kind: type) -> str | None:
    """Return the file a class was read from; empty for one that was typed in or made, ``None`` for one of the interpreter's."""
    module = sys.modules.get(kind.__module__)
    if module is None or kind.__module__ == "__main__":
        return getattr(module, "__file__", None) or ""
    return getattr(module, "__file__", None)


@functools.cache
def _is_installed(file: str | None) -> bool:
    """Whether ``file`` belongs to Python or to an installed package, which their versions stand for; ``None`` is what has no file."""
    if file is None or file.startswith("<frozen"):
        return True
    parts = set(Path(file).parts)
    return bool(parts & {"site-packages", "dist-packages"}) or file.startswith((sysconfig.get_path("stdlib"), _OURS))


@functools.cache
def _version(package: str) -> str:
    """Return the version of what is imported as ``package``; empty where it tells none, as the user's own code."""
    known = getattr(sys.modules.get(package), "__version__", None)
    if known is not None:
        return str(known)
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""


def _version_or_hash(module: types.ModuleType) -> str:
    file = getattr(module, "__file__", None)
    if _is_installed(file):
        return _version(module.__name__.partition(".")[0])
    try:
        return hashlib.sha256(Path(str(file)).read_bytes()).hexdigest()
    except OSError as error:
        raise Undescribable(f"the module {module.__name__} cannot be read ({error.strerror})") from None
