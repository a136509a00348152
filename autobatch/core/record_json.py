"""Frozen records to plain JSON values and back, every value checked against the record's own annotations."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

Record = TypeVar("Record")

_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def to_plain(value: Any) -> Any:
    """Return ``value`` in terms of dicts, lists, texts, numbers, booleans and ``None`` alone."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: type[Record], data: Any, where: str = "") -> Record:
    """Return the record of type ``kind`` that ``to_plain`` made ``data`` from; keys it does not know are passed over.

    Raises:
        ValueError: a value is missing or of another type; the message names it as ``where``.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'the document'} is not an object")
    hints = typing.get_type_hints(kind)
    values = {}
    for f in dataclasses.fields(kind):  # type: ignore[arg-type]
        path = f"{where}.{f.name}" if where else f.name
        if f.name in data:
            values[f.name] = _value(hints[f.name], data[f.name], path)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path} is missing")
    return kind(**values)


def _value(hint: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # every union in the records is "or None"
        return None if data is None else _value(next(a for a in arguments if a is not type(None)), data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise ValueError(f"{where} is not a list")
        return tuple(_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(data))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, dict):
            raise ValueError(f"{where} is not an object")
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast("type[Any]", hint), data, where)
    if isinstance(hint, type) and issubclass(hint, Enum):
        if data not in [member.value for member in hint]:
            raise ValueError(f"{where} is {data!r}; known: {', '.join(str(member.value) for member in hint)}")
        return hint(data)
    return data if hint is Any else _scalar(hint, data, where)


def _scalar(hint: Any, data: Any, where: str) -> Any:
    if hint is float and type(data) is int and abs(data) < 2**1023:
        data = float(data)
    if type(data) is not hint or (hint is float and not math.isfinite(data)):
        raise ValueError(f"{where} is not {_NAMES[hint]}")
    if hint is int and abs(data) >= 2**63:
        raise ValueError(f"{where} is beyond any amount of memory, rows or steps")
    return data
