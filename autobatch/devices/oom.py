"""Which errors are about memory: by exception type first, then by one table of messages.

Nothing above the devices reads an exception's text. A message that is in neither list is the user's error.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from autobatch.core.records import Outcome
from autobatch.devices.forget import chain


@dataclass(frozen=True, slots=True)
class Sign:
    """A message that tells what an error is.

    Attributes:
        pattern: regular expression, searched in the error's text without regard to case.
        outcome: what it stands for; ``None`` for an error that must not be taken for memory although it reads like it.
        source: what raises it.
    """

    pattern: str
    outcome: Outcome | None
    source: str

    def matches(self, text: str) -> bool:
        """Whether the pattern occurs in ``text``."""
        return re.search(self.pattern, text, re.IGNORECASE) is not None


# The first sign that matches decides, so what is not memory stands before what reads like it.
SIGNS: tuple[Sign, ...] = (
    Sign(r"more than 1EB memory", None, "allocator, asked for an absurd size: a bug or an overflow"),
    Sign(r"out of resource: shared memory", None, "Triton: a kernel's tile, not the batch"),
    Sign(r"device-side assert", None, "CUDA"),
    Sign(r"illegal memory access|misaligned address|illegal instruction", None, "CUDA, after which the process is unusable"),
    Sign(r"canUse32BitIndexMath|32-?bit index math", Outcome.KERNEL_LIMIT, "ATen kernels that index with 32 bits"),
    Sign(r"more than INT_MAX elements|INT_MAX.*elements", Outcome.KERNEL_LIMIT, "ATen and cuDNN"),
    Sign(r"CUDA error: invalid configuration argument", Outcome.KERNEL_LIMIT, "CUDA: a grid of more than 65,535 blocks"),
    Sign(r"Storage size calculation overflowed", Outcome.OOM, "ATen: more bytes than can be counted"),
    Sign(r"DefaultCPUAllocator: (can't allocate memory|not enough memory)", Outcome.HOST_OOM, "CPU allocator"),
    Sign(r"^std::bad_alloc|\bbad allocation\b", Outcome.HOST_OOM, "C++ runtime"),
    Sign(r"Cannot allocate memory|\[Errno 12\]", Outcome.HOST_OOM, "operating system"),
    Sign(
        r"unable to (mmap|allocate) [\d.]+ \w+ (bytes )?(from file|of pinned|for an array)",
        Outcome.HOST_OOM,
        "mmap, pinned memory, NumPy",
    ),
    Sign(r"DataLoader worker .* killed by signal: Killed", Outcome.HOST_OOM, "a data loader that the kernel killed"),
    Sign(r"UR_RESULT_ERROR_OUT_OF_HOST_MEMORY", Outcome.HOST_OOM, "XPU runtime"),
    Sign(r"RESOURCE_EXHAUSTED: |ResourceExhaustedError|OOM when allocating tensor", Outcome.OOM, "XLA (JAX) and TensorFlow"),
    Sign(r"\b(CUDA|HIP|XPU|NPU|MLU|MUSA) out of memory\b", Outcome.OOM, "caching allocators"),
    Sign(r"\b(CUDA|HIP|CUDA driver) error: out of memory", Outcome.OOM, "driver, outside the allocator"),
    Sign(r"would exceed allowed memory\. \(out of memory\)", Outcome.OOM, "cudaMallocAsync"),
    Sign(
        r"NVML_SUCCESS == r INTERNAL ASSERT FAILED.*CUDACachingAllocator",
        Outcome.OOM,
        "allocator whose message NVML broke (MIG, Jetson)",
    ),
    Sign(r"MPS backend out of memory", Outcome.OOM, "MPS"),
    Sign(r"UR_RESULT_ERROR_OUT_OF_(DEVICE_MEMORY|RESOURCES)", Outcome.OOM, "XPU runtime"),
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
)

# CUDA's own list of errors after which "the process must be terminated and relaunched", by their messages.
_STICKY = re.compile(
    r"device-side assert|illegal memory access|misaligned address|illegal instruction|hardware stack error|invalid (program counter|"
    r"address space)|unspecified launch failure|launch timed out|uncorrectable (ECC|NVLink) error|CUDA error: device .* lost",
    re.IGNORECASE,
)


def classify(error: BaseException, *, on_cpu: bool = False) -> Outcome | None:
    """Return the outcome that ``error``, or anything it was raised from, stands for; ``None`` for the user's own errors.

    With ``on_cpu`` host memory is the device's memory, so running out of it is ``oom``.
    """
    for one in chain(error):
        outcome = _classify_one(one)
        if outcome is not None:
            return Outcome.OOM if on_cpu and outcome is Outcome.HOST_OOM else outcome
    return None


def is_sticky(error: BaseException) -> bool:
    """Whether ``error`` has left this process unable to use the GPU again."""
    return any(isinstance(one, RuntimeError) and _STICKY.search(str(one)) is not None for one in chain(error))


def _classify_one(error: BaseException) -> Outcome | None:
    if isinstance(error, MemoryError):
        return Outcome.HOST_OOM
    # An error of Python's own types is never the allocator's, whatever its text says: a missing key may be called anything.
    if not isinstance(error, (RuntimeError, OSError)):
        return None
    text = str(error)
    sign = next((sign for sign in SIGNS if sign.matches(text)), None)
    if sign is not None:
        return sign.outcome
    torch = sys.modules.get("torch")
    return Outcome.OOM if torch is not None and isinstance(error, torch.OutOfMemoryError) else None
