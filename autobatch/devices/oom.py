"""Which errors are about memory: by exception type first, then by one table of messages.

Nothing above the devices reads an exception's text. A message that is in neither list is the user's error.
"""

from __future__ import annotations

import builtins
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from autobatch.core.records import Outcome
from autobatch.devices.forget import chain, said_by


@dataclass(frozen=True, slots=True)
class Sign:
    """A message that tells what an error is.

    Attributes:
        pattern: regular expression, searched in the error's text without regard to case.
        outcome: what it stands for; ``None`` for an error that must not be taken for memory although it reads like it.
        source: what raises it.
        doubtful: whether the same text has other causes too; it then counts only where the same step ran with fewer rows.
    """

    pattern: str
    outcome: Outcome | None
    source: str
    doubtful: bool = False

    def matches(self, text: str) -> bool:
        """Whether the pattern occurs in ``text``."""
        return re.search(self.pattern, text, re.IGNORECASE) is not None


# The first sign that matches decides, so what is not memory stands before what reads like it.
SIGNS: tuple[Sign, ...] = (
    Sign(r"more than 1EB memory", None, "allocator, asked for an absurd size: a bug or an overflow"),
    Sign(r"out of resource: ", None, "Triton: a kernel's tile, registers or shared memory, not the batch"),
    Sign(r"device-side assert", None, "CUDA"),
    Sign(r"illegal memory access|misaligned address|illegal instruction", None, "CUDA, after which the process is unusable"),
    Sign(r"canUse32BitIndexMath|32-?bit index math", Outcome.KERNEL_LIMIT, "ATen kernels that index with 32 bits"),
    Sign(r"more than INT_MAX elements|INT_MAX.*elements", Outcome.KERNEL_LIMIT, "ATen and cuDNN"),
    Sign(r"numel needs to be smaller than int32_t max", Outcome.KERNEL_LIMIT, "ATen's 32-bit accessors"),
    Sign(r"must be non-negative and less than 2147483647", Outcome.KERNEL_LIMIT, "cuBLAS: dimensions are C ints"),
    Sign(r"does not support tensor dims larger than INT_MAX", Outcome.KERNEL_LIMIT, "MPSGraph"),
    Sign(r"(CUDA|HIP) error: invalid configuration argument", Outcome.KERNEL_LIMIT, "CUDA, HIP: a grid of more than 65,535 blocks"),
    Sign(r"Storage size calculation overflowed", Outcome.OOM, "ATen: more bytes than can be counted"),
    Sign(r"CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation|cuMemAlloc failed: out of memory", Outcome.OOM, "Numba, RMM, PyCUDA"),
    Sign(r"^Out of memory allocating [\d,]+ bytes \(allocated so far", Outcome.OOM, "CuPy"),
    Sign(r"DefaultCPUAllocator: (can't allocate memory|not enough memory)", Outcome.HOST_OOM, "CPU allocator"),
    Sign(r"^std::bad_alloc|\bbad allocation\b", Outcome.HOST_OOM, "C++ runtime"),
    Sign(r"Cannot allocate memory|\[Errno 12\]", Outcome.HOST_OOM, "operating system"),
    Sign(
        r"unable to (mmap|allocate) [\d.]+ \w+ (bytes )?(from file|of pinned|for an array)",
        Outcome.HOST_OOM,
        "mmap, pinned memory, NumPy",
    ),
    Sign(r"DataLoader worker .* killed by signal: Killed", Outcome.HOST_OOM, "a data loader that the kernel killed"),
    Sign(
        r"DataLoader worker .* killed by signal: Bus error|unable to write to file </torch_.*No space left on device",
        Outcome.HOST_OOM,
        "data loaders: batches pass through /dev/shm, which is full",
    ),
    Sign(r"terminated with signal SIGKILL", Outcome.HOST_OOM, "torch.multiprocessing: a process that the kernel killed"),
    Sign(r"WinError 1455|error code: <1455>|paging file is too small", Outcome.HOST_OOM, "Windows"),
    Sign(r"(UR_RESULT|PI)_ERROR_OUT_OF_HOST_MEMORY", Outcome.HOST_OOM, "XPU runtime"),
    Sign(r"RESOURCE_EXHAUSTED: |OOM when allocating tensor", Outcome.OOM, "XLA (JAX) and TensorFlow"),
    Sign(r"\b(CUDA|HIP|XPU|NPU|MLU|MUSA) out of memory\b", Outcome.OOM, "caching allocators"),
    Sign(
        r"\b(CUDA|HIP|CUDA driver) error: out of memory|Triton Error \[(CUDA|HIP)\]: out of memory",
        Outcome.OOM,
        "driver, outside the allocator",
    ),
    Sign(r"would exceed allowed memory\. \(out of memory\)", Outcome.OOM, "cudaMallocAsync"),
    Sign(
        r"NVML_SUCCESS == .*INTERNAL ASSERT FAILED.*CUDACachingAllocator",
        Outcome.OOM,
        "allocator whose message NVML broke (MIG, Jetson)",
    ),
    Sign(r"MPS backend out of memory|^Invalid buffer size: [\d.]+ [KMGT]i?B", Outcome.OOM, "MPS"),
    Sign(r"(UR_RESULT|PI)_ERROR_OUT_OF_(DEVICE_MEMORY|RESOURCES)", Outcome.OOM, "XPU runtime"),
    Sign(r"MODULE:PT_DEVMEM Allocation failed", Outcome.OOM, "Gaudi"),
    Sign(r"CUBLAS_STATUS_ALLOC_FAILED|HIPBLAS_STATUS_ALLOC_FAILED", Outcome.OOM, "cuBLAS"),
    Sign(r"CUDNN_STATUS_ALLOC_FAILED", Outcome.OOM, "cuDNN 8"),
    Sign(r"CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", Outcome.OOM, "cuDNN 9"),
    Sign(r"CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED", Outcome.HOST_OOM, "cuDNN 9"),
    Sign(
        r"CUDNN_STATUS_NOT_SUPPORTED\. This error may appear if you passed in a non-contiguous",
        Outcome.OOM,
        "cuDNN, batch too large",
    ),
    Sign(
        r"CUFFT_ALLOC_FAILED|CUSOLVER_STATUS_ALLOC_FAILED|CUSPARSE_STATUS_ALLOC_FAILED",
        Outcome.OOM,
        "cuFFT, cuSOLVER, cuSPARSE",
    ),
    Sign(r"CUSPARSE_STATUS_INSUFFICIENT_RESOURCES|Not enough memory for workspace", Outcome.OOM, "cuSPARSE, cuSOLVER"),
    Sign(r"Cuda failure \d* ?'out of memory'|ncclMemAlloc failed", Outcome.OOM, "NCCL"),
    Sign(r"CUBLAS_STATUS_NOT_INITIALIZED.*cublasCreate", Outcome.OOM, "cuBLAS, no room for its handle", doubtful=True),
    Sign(r"unable to find an engine to execute this computation", Outcome.OOM, "cuDNN, no algorithm has room", doubtful=True),
    Sign(r"CUDNN_STATUS_INTERNAL_ERROR$", Outcome.OOM, "cuDNN 7 and 8, no room for its handle", doubtful=True),
)

# CUDA's own list of errors after which "the process must be terminated and relaunched", by their messages and their numbers.
_STICKY = re.compile(
    r"device-side assert|illegal memory access|misaligned address|illegal instruction|hardware stack error|invalid (program counter|"
    r"address space)|operation not supported on global/shared address space|unspecified launch failure|launch timed out|"
    r"uncorrectable (ECC|NVLink) error|CUDA error: device .* lost|\bMemory access fault by GPU",
    re.IGNORECASE,
)
_STICKY_CODES = frozenset({214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 911})

# Types that say what ran out although they are neither RuntimeError nor OSError: torch.multiprocessing, TensorFlow, Numba.
_SPEAKING = frozenset({"ProcessRaisedException", "ProcessExitedException", "ResourceExhaustedError", "CudaAPIError"})

_HEADER = "Traceback (most recent call last):"
_GUTTER = re.compile(r"^ *[|+] ?")  # what Python draws before the lines of an exception group
_LAST_LINE = re.compile(r"((?:\w+\.)*[A-Za-z_]\w*)(?:: (.*))?$", re.DOTALL)
_BETWEEN = ("During handling of the above exception", "The above exception was the direct cause")


def classify(error: BaseException, *, on_cpu: bool = False, ran_before: bool = False) -> Outcome | None:
    """Return the outcome that ``error``, or anything it was raised from, stands for; ``None`` for the user's own errors.

    With ``on_cpu`` host memory is the device's memory, so running out of it is ``oom``. ``ran_before`` says that the same step ran with
    fewer rows, which decides messages that are in doubt. An error after which the process is unusable is never about memory, even where
    one that is about memory came before it: ask ``is_sticky``.
    """
    if is_sticky(error):
        return None
    for one in chain(error):
        outcome = _classify_one(one, ran_before)
        if outcome is not None:
            return Outcome.OOM if on_cpu and outcome is Outcome.HOST_OOM else outcome
    return None


def is_sticky(error: BaseException) -> bool:
    """Whether ``error`` has left this process unable to use the GPU again."""
    return any(_is_sticky_one(one) for one in chain(error))


def _is_sticky_one(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    # Since torch 2.9 the errors of an accelerator carry its own number.
    if getattr(error, "error_code", None) in _STICKY_CODES:
        return True
    text = said_by(error)
    if "in DataLoader worker process" in text:
        return False  # another process's GPU context was lost
    return any(_STICKY.search(message) is not None for _, message in _spoken(type(error).__name__, text))


def _classify_one(error: BaseException, ran_before: bool) -> Outcome | None:
    """Return the outcome of ``error`` alone."""
    kind = type(error)
    # An error of Python's own types is never the allocator's, whatever its text says: a missing key may be called anything.
    if not isinstance(error, (RuntimeError, OSError, MemoryError)) and kind.__name__ not in _SPEAKING:
        return None
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError):
        name = "MemoryError"
    else:
        name = "OutOfMemoryError" if torch is not None and isinstance(error, torch.OutOfMemoryError) else kind.__name__
    outcomes = [_judge(one, message, ran_before) for one, message in _spoken(name, said_by(error))]
    return next((outcome for outcome in outcomes if outcome is not None), None)


def _judge(name: str, text: str, ran_before: bool) -> Outcome | None:
    """Return what an error of the type called ``name`` stands for when it says ``text``."""
    sign = next((sign for sign in SIGNS if sign.matches(text) and (ran_before or not sign.doubtful)), None)
    short = name.rpartition(".")[2]
    if short in ("MemoryError", "_ArrayMemoryError"):
        return Outcome.OOM if sign is not None and sign.outcome is Outcome.OOM else Outcome.HOST_OOM
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, BaseException) and not issubclass(kind, (RuntimeError, OSError)):
        return None
    if sign is not None:
        return sign.outcome
    return Outcome.OOM if short == "OutOfMemoryError" else None


def _spoken(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Yield type name and message of an error and of each error whose traceback its text carries.

    Data loaders, replicas and spawned processes raise a new error whose text is the old one's whole traceback. The traceback's own lines
    are left out: source code may mention any error.
    """
    if _HEADER not in text:
        yield name, text
        return
    spoken, in_frames = [(name, text[: text.index(_HEADER)])], False
    carried = text[text.index(_HEADER) :].splitlines()
    for line in (_GUTTER.sub("", line) for line in carried):
        if line.endswith(_HEADER):
            in_frames = True
        elif in_frames and not line.startswith(" ") and (last := _LAST_LINE.match(line)):
            spoken.append((last[1], last[2] or ""))
            in_frames = False
        elif not in_frames and not line.startswith(_BETWEEN):
            spoken[-1] = (spoken[-1][0], f"{spoken[-1][1]}\n{line}")
    # The type outside is the one inside, made again with the whole traceback as its message: it says nothing of its own.
    yield from spoken[1:] if len(spoken) > 1 else [(name, text)]
