from __future__ import annotations

import gc
import weakref

import pytest
import torch

from autobatch import Outcome
from autobatch.devices.forget import forget
from autobatch.devices.oom import SIGNS, classify, is_sticky

# Before torch 2.8 the same errors were plain RuntimeErrors.
ACCELERATOR_ERROR: type[RuntimeError] = getattr(torch, "AcceleratorError", RuntimeError)
OOM, HOST, LIMIT = Outcome.OOM, Outcome.HOST_OOM, Outcome.KERNEL_LIMIT

# Messages as they are raised in the field, shortened; the exception's type as the source raises it.
MESSAGES: list[tuple[type[BaseException], str, Outcome | None]] = [
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB", OOM),
    (
        torch.OutOfMemoryError,
        "CUDA out of memory. Allocation was preemptively rejected because it would exceed per_process_memory_fraction",
        OOM,
    ),
    (
        torch.OutOfMemoryError,
        "Allocation on device 0 would exceed allowed memory. (out of memory)\nCurrently allocated : 9.00 GiB",
        OOM,
    ),
    (torch.OutOfMemoryError, "HIP out of memory. Tried to allocate 2.00 GiB", OOM),
    (torch.OutOfMemoryError, "XPU out of memory. Tried to allocate 2.00 GiB", OOM),
    (torch.OutOfMemoryError, "a wording of the future", OOM),
    (RuntimeError, "CUDA out of memory. Tried to allocate 20.00 MiB", OOM),
    (RuntimeError, "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", OOM),
    (ACCELERATOR_ERROR, "CUDA error: out of memory", OOM),
    (RuntimeError, "CUDA driver error: out of memory", OOM),
    (RuntimeError, "HIP error: out of memory", OOM),
    (
        RuntimeError,
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":838, please report a bug',
        OOM,
    ),
    (
        RuntimeError,
        "MPS backend out of memory (MPS allocated: 18.00 GB, other allocations: 1.00 MB, max allowed: 18.13 GB)",
        OOM,
    ),
    (RuntimeError, "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)", OOM),
    (RuntimeError, "level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)", OOM),
    (RuntimeError, "level_zero backend failed with error: 38 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)", HOST),
    (RuntimeError, "FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::1073741824 (1024)MB", OOM),
    (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", OOM),
    (RuntimeError, "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`", OOM),
    (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", OOM),
    (RuntimeError, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", OOM),
    (RuntimeError, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED", HOST),
    (
        RuntimeError,
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
        OOM,
    ),
    (RuntimeError, "cuFFT error: CUFFT_ALLOC_FAILED", OOM),
    (RuntimeError, "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`", OOM),
    (RuntimeError, "CUDA error: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES when calling `cusparseSpMM`", OOM),
    (
        RuntimeError,
        "NCCL error: unhandled cuda error. ncclUnhandledCudaError: Call to CUDA function failed. Cuda failure 2 'out of memory'",
        OOM,
    ),
    (RuntimeError, "Storage size calculation overflowed with sizes=[1152921504606846976]", OOM),
    (
        RuntimeError,
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
        HOST,
    ),
    (
        RuntimeError,
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
        HOST,
    ),
    (RuntimeError, "std::bad_alloc", HOST),
    (MemoryError, "", HOST),
    (MemoryError, "Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type float64", HOST),
    (OSError, "[Errno 12] Cannot allocate memory", HOST),
    (RuntimeError, "unable to mmap 8589934592 bytes from file </torch_1_2_3>: Cannot allocate memory (12)", HOST),
    (RuntimeError, "DataLoader worker (pid 4121) is killed by signal: Killed.", HOST),
    (RuntimeError, "Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true, but got false.", LIMIT),
    (RuntimeError, "input tensor must fit into 32-bit index math", LIMIT),
    (RuntimeError, "nll_loss2d_forward: at::cuda only supports input with no more than INT_MAX elements", LIMIT),
    (ACCELERATOR_ERROR, "CUDA error: invalid configuration argument", LIMIT),
    (RuntimeError, "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes.", OOM),
    # What is not memory although it may read like it.
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate more than 1EB memory.", None),
    (
        RuntimeError,
        "out of resource: shared memory, Required: 180224, Hardware limit: 101376. Reducing block sizes may help.",
        None,
    ),
    (ACCELERATOR_ERROR, "CUDA error: device-side assert triggered", None),
    (ACCELERATOR_ERROR, "CUDA error: an illegal memory access was encountered", None),
    (RuntimeError, "CUDA error: misaligned address", None),
    (RuntimeError, "mat1 and mat2 shapes cannot be multiplied (4x5 and 3x2)", None),
    (RuntimeError, "view size is not compatible with input tensor's size; call .contiguous() to use the same memory", None),
    (RuntimeError, "the replay memory is empty", None),
    (RuntimeError, "memory format option is only supported by strided tensors", None),
    (RuntimeError, "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", None),
    (RuntimeError, "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", None),
    (RuntimeError, "CUDA error: no kernel image is available for execution on the device", None),
    (ValueError, "CUDA out of memory. Tried to allocate 20.00 MiB", None),
    (KeyError, "CUDA out of memory", None),
    (OSError, "[Errno 28] No space left on device", None),
    (AssertionError, "out of memory", None),
]


@pytest.mark.parametrize(("kind", "message", "outcome"), MESSAGES, ids=lambda value: getattr(value, "__name__", str(value))[:50])
def test_each_message_is_known_for_what_it_is(kind: type[BaseException], message: str, outcome: Outcome | None) -> None:
    assert classify(kind(message)) is outcome
    on_cpu = Outcome.OOM if outcome is HOST else outcome
    assert classify(kind(message), on_cpu=True) is on_cpu


def test_every_sign_has_a_message_that_it_decides() -> None:
    decided = {next((s.pattern for s in SIGNS if s.matches(m)), None) for _, m, _ in MESSAGES}
    assert {sign.pattern for sign in SIGNS} <= decided


def raised(build: object) -> BaseException:
    try:
        build()  # type: ignore[operator]
    except BaseException as error:  # noqa: BLE001 any exception is what is wanted
        return error
    raise AssertionError("nothing was raised")


def test_real_errors_of_this_build_are_known() -> None:
    assert classify(raised(lambda: torch.empty(2**55))) is HOST
    assert classify(raised(lambda: torch.empty(2**62))) is OOM
    assert classify(raised(lambda: bytearray(2**62))) is HOST
    assert classify(raised(lambda: torch.ones(2, 3) @ torch.ones(2, 3))) is None


def wrap_explicitly() -> None:
    try:
        torch.empty(2**55)
    except RuntimeError as error:
        raise ValueError("the layer failed") from error


def wrap_in_passing() -> None:
    try:
        torch.empty(2**55)
    except RuntimeError:
        raise KeyError("cleanup")  # noqa: B904 a second fault while the first is handled


def test_wrapped_errors_are_known_by_what_is_inside() -> None:
    assert classify(raised(wrap_explicitly)) is HOST
    assert classify(raised(wrap_in_passing)) is HOST


def test_groups_and_several_arguments_are_looked_into() -> None:
    assert classify(RuntimeError("rank 3", "CUDA error: out of memory")) is OOM
    group = getattr(__builtins__, "ExceptionGroup", None) if not isinstance(__builtins__, dict) else __builtins__.get("ExceptionGroup")
    if group is not None:  # Python 3.11
        assert classify(group("tasks", [ValueError("x"), RuntimeError("CUDA error: out of memory")])) is OOM


def test_errors_that_end_the_process_for_the_gpu_are_sticky() -> None:
    assert is_sticky(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert is_sticky(ACCELERATOR_ERROR("CUDA error: device-side assert triggered"))
    assert not is_sticky(RuntimeError("CUDA error: out of memory"))
    assert not is_sticky(ValueError("illegal memory access"))


def test_forgetting_frees_what_the_frames_held() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def inner() -> None:
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        raise RuntimeError("CUDA error: out of memory")

    def outer() -> None:
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        try:
            inner()
        except RuntimeError as error:
            kept = error  # a cycle: the frame holds the error, the error holds the frame
            raise ValueError("wrapped") from kept

    gc.disable()
    try:
        error = raised(outer)
        assert [ref() is not None for ref in held] == [True, True]
        forget(error)
        assert [ref() is not None for ref in held] == [False, False]
    finally:
        gc.enable()
    assert str(error) == "wrapped"
