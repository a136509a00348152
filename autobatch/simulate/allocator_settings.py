"""PYTORCH_CUDA_ALLOC_CONF, read as PyTorch reads it, as far as it decides how much memory a step needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from autobatch.core.errors import InvalidRequest
from autobatch.core.units import MIB

# In the order in which PyTorch's own parser looks for them.
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
# Sizes up to which rounding to a fraction of a power of two can be set apart: 1 MiB to 64 GiB.
_ROUNDUP_INTERVALS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorSettings:
    """How the caching allocator behaves; the defaults are PyTorch's.

    Attributes:
        expandable_segments: whether segments grow page by page.
        max_split_size: blocks of this many bytes or more are never split, ``None`` for no limit.
        max_non_split_rounding: bytes by which such a block may exceed the request it serves.
        garbage_collection_threshold: fraction of the allowed memory above which unused blocks are given back, 0 for never.
        roundup_power2_divisions: steps between two powers of two that sizes are rounded up to, per interval from 1 MiB on; 0 for off.
        large_segment: bytes of a segment for requests between 1 and 10 MiB.
        backend: ``"native"`` or ``"cudaMallocAsync"``.
    """

    expandable_segments: bool = False
    max_split_size: int | None = None
    max_non_split_rounding: int = 20 * MIB
    garbage_collection_threshold: float = 0.0
    roundup_power2_divisions: tuple[int, ...] = (0,) * _ROUNDUP_INTERVALS
    large_segment: int = 20 * MIB
    backend: str = "native"

    @classmethod
    def parse(cls, text: str) -> AllocatorSettings:
        """Return the settings in ``text``, ``option:value`` pairs with commas between them.

        Raises:
            InvalidRequest: an option is unknown or its value cannot be meant.
        """
        settings = cls()
        for option, value in _pairs(text):
            if option in _HARMLESS:
                continue
            if option not in _READERS:
                raise InvalidRequest(
                    f"PYTORCH_CUDA_ALLOC_CONF has an unknown option {option!r}. Known: {', '.join(sorted((*_READERS, *_HARMLESS)))}."
                )
            try:
                settings = replace(settings, **_READERS[option](value))
            except ValueError as error:
                raise InvalidRequest(f"PYTORCH_CUDA_ALLOC_CONF: {option}:{value} cannot be meant: {error}.") from None
        return settings

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> AllocatorSettings:
        """Return the settings of the first variable that is set."""
        return cls.parse(next((environment[name] for name in VARIABLES if environment.get(name)), ""))

    def divisions(self, size: int) -> int:
        """Return the steps between powers of two that apply to ``size`` bytes."""
        return self.roundup_power2_divisions[max(0, min((size // MIB).bit_length() - 1, _ROUNDUP_INTERVALS - 1))]


def _pairs(text: str) -> list[tuple[str, str]]:
    """Split at the commas outside square brackets, and each part at its first colon."""
    pairs, depth, part = [], 0, ""
    for letter in text.replace(" ", "") + ",":
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            if part:
                option, colon, value = part.partition(":")
                if not colon or not value:
                    raise InvalidRequest(f"PYTORCH_CUDA_ALLOC_CONF has {part!r}, which is no option:value pair.")
                pairs.append((option, value))
            part = ""
        else:
            part += letter
    if part:
        raise InvalidRequest(f"PYTORCH_CUDA_ALLOC_CONF has a bracket that is not closed: {text!r}.")
    return pairs


def _switch(value: str) -> bool:
    if value not in ("True", "False"):
        raise ValueError("True or False is wanted")
    return value == "True"


def _split_size(value: str) -> dict[str, Any]:
    megabytes = int(value)
    if megabytes <= 20:
        raise ValueError("more than 20 MiB are wanted")
    return {"max_split_size": megabytes * MIB}


def _rounding(value: str) -> dict[str, Any]:
    megabytes = int(value)
    if megabytes <= 20:
        raise ValueError("more than 20 MiB are wanted")
    return {"max_non_split_rounding": megabytes * MIB}


def _threshold(value: str) -> dict[str, Any]:
    fraction = float(value)
    if not 0 < fraction < 1:
        raise ValueError("a fraction between 0 and 1 is wanted")
    return {"garbage_collection_threshold": fraction}


def _divisions(value: str) -> dict[str, Any]:
    """Read one number for all sizes, or ``[256:1,512:2,>:8]`` with sizes in MiB."""
    if not value.startswith("["):
        return {"roundup_power2_divisions": (_power_of_two(value),) * _ROUNDUP_INTERVALS}
    steps = [0] * _ROUNDUP_INTERVALS
    last = 0
    for entry in value.strip("[]").split(","):
        size, _, count = entry.partition(":")
        index = _ROUNDUP_INTERVALS if size == ">" else _power_of_two(size).bit_length() - 1
        until = index if size == ">" else index + 1
        steps[last:until] = [_power_of_two(count)] * (until - last)
        last = until
    return {"roundup_power2_divisions": tuple(steps[:_ROUNDUP_INTERVALS])}


def _power_of_two(text: str) -> int:
    number = int(text)
    if number < 0 or number & (number - 1):
        raise ValueError("a power of two is wanted")
    return number


def _large_segment(value: str) -> dict[str, Any]:
    megabytes = int(value)
    if megabytes < 2 or megabytes % 2:
        raise ValueError("an even number of MiB is wanted")
    return {"large_segment": megabytes * MIB}


def _backend(value: str) -> dict[str, Any]:
    if value not in ("native", "cudaMallocAsync"):
        raise ValueError("native or cudaMallocAsync is wanted")
    return {"backend": value}


_READERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "expandable_segments": lambda value: {"expandable_segments": _switch(value)},
    "max_split_size_mb": _split_size,
    "max_non_split_rounding_mb": _rounding,
    "garbage_collection_threshold": _threshold,
    "roundup_power2_divisions": _divisions,
    "large_segment_size_mb": _large_segment,
    "backend": _backend,
}
# They change how memory is obtained or pinned on the host, not how much a step needs.
_HARMLESS = frozenset(
    {
        "release_lock_on_cudamalloc",
        "pinned_use_cuda_host_register",
        "pinned_num_register_threads",
        "pinned_use_background_threads",
        "pinned_reserve_segment_size_mb",
        "graph_capture_record_stream_reuse",
        "per_process_memory_fraction",
        "throw_on_cudamalloc_oom",
        "expandable_segments_reserve",
        "expandable_segments_reserve_by_class",
    }
)
