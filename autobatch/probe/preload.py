"""Libraries that one worker has imported, imported once more before the next is forked: from then on no worker does it again."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import sys
import sysconfig
from collections.abc import Collection, Iterator

# A pipe takes 64 KiB without a reader.
_MOST_BYTES = 60_000


def imported_since(before: Collection[str]) -> bytes:
    """Return the names of the installed modules that this process has imported beyond ``before``, none where it has started CUDA.

    What is not installed is the user's own and may do anything when it is imported; CUDA does not survive a fork.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return b""
    folders = tuple({sysconfig.get_path(kind) for kind in ("purelib", "platlib")})
    found = [
        name
        for name, module in list(sys.modules.items())
        if name not in before and str(getattr(module, "__file__", None)).startswith(folders) and name.isprintable()
    ]
    text = "\n".join(found).encode()
    return text if len(text) <= _MOST_BYTES else text[:_MOST_BYTES].rpartition(b"\n")[0]


def load(names: bytes) -> None:
    """Import modules by ``names``, as far as that works here, and where no import can start threads that a fork would wait for for ever."""
    openmp = _openmp()
    if not names or openmp is None:
        return
    threads = openmp.omp_get_max_threads()
    openmp.omp_set_num_threads(1)
    with uncollected():
        for name in names.decode().split("\n"):
            if name not in sys.modules:
                with contextlib.suppress(BaseException):
                    importlib.import_module(name)
    openmp.omp_set_num_threads(threads)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keep the collector from what is loaded meanwhile, for good: none of it is garbage, and looking at it takes a third of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _openmp() -> ctypes.CDLL | None:
    """Return the threads that torch computes with, ``None`` where they cannot be told how many to be."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "omp_set_num_threads") and hasattr(library, "omp_get_max_threads") else None
