"""Every out-of-memory error there is, and what reads like one: a row each, then everything that wraps them, from real wrappers."""

from __future__ import annotations

import builtins
import concurrent.futures
import gc
import sys
import weakref
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from autobatch import Outcome
from autobatch.devices.cpu import CpuDevice
from autobatch.devices.forget import chain, forget
from autobatch.devices.oom import SIGNS, classify, is_sticky

# Before torch 2.8 the same errors were plain RuntimeErrors.
ACCELERATOR_ERROR: type[RuntimeError] = getattr(torch, "AcceleratorError", RuntimeError)
OOM, HOST, LIMIT = Outcome.OOM, Outcome.HOST_OOM, Outcome.KERNEL_LIMIT


class DistBackendError(RuntimeError):
    """As torch.distributed's, which a build without it has not."""


class ResourceExhaustedError(Exception):
    """As TensorFlow's."""


class CudaAPIError(Exception):
    """As Numba's."""


class OutOfResources(Exception):
    """As Triton's."""


class ProcessExitedException(Exception):
    """As torch.multiprocessing's."""


RUN, TORCH, ACCELERATOR, DIST = RuntimeError, torch.OutOfMemoryError, ACCELERATOR_ERROR, DistBackendError


# Source, the type it raises, its message (shortened), and what that stands for; ``None`` is the user's error.
ROWS: list[tuple[str, type[BaseException], str, Outcome | None]] = [
    # The device's memory.
    ("cuda allocator", TORCH, "CUDA out of memory. Tried to allocate 20.00 MiB.", OOM),
    ("cuda allocator, torch 1", RUN, "CUDA out of memory. Tried to allocate 20.00 MiB", OOM),
    ("fraction, torch 2.13", TORCH, "Allocation was preemptively rejected because it would exceed per_process_memory_fraction", OOM),
    ("cudaMallocAsync", TORCH, "Allocation on device 0 would exceed allowed memory. (out of memory)", OOM),
    ("cudaMallocAsync, type lost", RUN, "Allocation on device 0 would exceed allowed memory. (out of memory)", OOM),
    ("allocator to come", TORCH, "a wording of the future", OOM),
    ("cuda driver", RUN, "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", OOM),
    ("cuda driver, torch 2.8", ACCELERATOR, "CUDA error: out of memory", OOM),
    ("cuda driver api", RUN, "CUDA driver error: out of memory", OOM),
    ("triton, kernel load", RUN, "Triton Error [CUDA]: out of memory", OOM),
    ("nvml on MIG", RUN, 'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "c10/cuda/CUDACachingAllocator.cpp":838', OOM),
    ("nvml, init", RUN, 'NVML_SUCCESS == DriverAPI::get()->nvmlInit_v2_() INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp":963', OOM),
    ("nvml on Jetson", RUN, 'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/opt/pytorch/c10/cuda/CUDACachingAllocator.cpp":1131', OOM),
    ("hip allocator", TORCH, "HIP out of memory. Tried to allocate 2.00 GiB.", OOM),
    ("hip driver", RUN, "HIP error: out of memory\nHIP kernel errors might be asynchronously reported", OOM),
    ("xpu allocator", TORCH, "XPU out of memory. Tried to allocate 2.00 GiB", OOM),
    ("xpu runtime, device memory", RUN, "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)", OOM),
    ("xpu runtime, resources", RUN, "level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)", OOM),
    ("xpu runtime, before 2025", RUN, "Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)", OOM),
    ("mps allocator", RUN, "MPS backend out of memory (MPS allocated: 18.00 GB, max allowed: 18.13 GB)", OOM),
    ("mps, one buffer", RUN, "Invalid buffer size: 20.00 GB", OOM),
    ("hpu", RUN, "FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::1073741824 (1024)MB", OOM),
    ("npu allocator", RUN, "NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; 60.97 GiB total capacity)", OOM),
    ("cublas handle", RUN, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", OOM),
    ("hipblas handle", RUN, "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`", OOM),
    ("cudnn 8", RUN, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", OOM),
    ("cudnn 8, too large", RUN, "CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.", OOM),
    ("cudnn 9, device", RUN, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", OOM),
    ("cufft", RUN, "cuFFT error: CUFFT_ALLOC_FAILED", OOM),
    ("cusolver handle", RUN, "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`", OOM),
    ("cusolver workspace", RUN, "Not enough memory for workspace!", OOM),
    ("cusparse resources", RUN, "CUSPARSE_STATUS_INSUFFICIENT_RESOURCES when calling `cusparseSpMM`", OOM),
    ("cusparse handle", RUN, "CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`", OOM),
    ("nccl", DIST, "unhandled cuda error\nncclUnhandledCudaError: Call failed.\nLast error:\nCuda failure 2 'out of memory'", OOM),
    ("nccl, its own buffers", DIST, "NCCL error: ncclMemAlloc failed", OOM),
    ("sizes that overflow", RUN, "Storage size calculation overflowed with sizes=[1152921504606846976]", OOM),
    ("xla", RUN, "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes.", OOM),
    ("tensorflow", ResourceExhaustedError, "OOM when allocating tensor with shape[4096,4096] and type float on GPU:0 by GPU_0_bfc", OOM),
    ("numba", CudaAPIError, "[2] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY", OOM),
    ("cupy", MemoryError, "Out of memory allocating 8,000,000,000 bytes (allocated so far: 16,000,000,000 bytes).", OOM),
    ("rmm", MemoryError, "std::bad_alloc: out_of_memory: CUDA error at: cuda.hpp:60: cudaErrorMemoryAllocation out of memory", OOM),
    # The host's memory.
    ("cpu allocator", RUN, "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9", HOST),
    ("cpu, Windows", RUN, "[enforce fail at alloc_cpu.cpp:80] DefaultCPUAllocator: not enough memory: you tried to allocate 9", HOST),
    ("c++", RUN, "std::bad_alloc", HOST),
    ("python", MemoryError, "", HOST),
    ("numpy", MemoryError, "Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type float64", HOST),
    ("fork of a data loader", OSError, "[Errno 12] Cannot allocate memory", HOST),
    ("mmap", RUN, "unable to mmap 8589934592 bytes from file </torch_1_2_3>: Cannot allocate memory (12)", HOST),
    ("mmap, its reason cut off", RUN, "unable to mmap 8589934592 bytes from file <weights.bin>", HOST),
    ("/dev/shm, writing", RUN, "unable to write to file </torch_1_2_3>: No space left on device (28)", HOST),
    ("/dev/shm, touching", RUN, "DataLoader worker (pid 7) is killed by signal: Bus error.", HOST),
    ("kernel, data loader", RUN, "DataLoader worker (pid 4121) is killed by signal: Killed.", HOST),
    ("kernel, spawned process", ProcessExitedException, "process 0 terminated with signal SIGKILL", HOST),
    ("windows paging file", OSError, "[WinError 1455] The paging file is too small", HOST),
    ("cudnn 9, host", RUN, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED", HOST),
    ("xpu runtime, host", RUN, "level_zero backend failed with error: 38 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)", HOST),
    # Too large whatever the memory.
    ("32-bit indices", RUN, "Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true", LIMIT),
    ("32-bit indices, pooling", RUN, "input tensor must fit into 32-bit index math", LIMIT),
    ("32-bit indices, loss", RUN, "nll_loss2d_forward: at::cuda only supports input with no more than INT_MAX elements", LIMIT),
    ("32-bit indices, upsampling", RUN, "upsample_nearest2d_nhwc only supports output tensors with less than INT_MAX elements", LIMIT),
    ("32-bit accessor", RUN, "numel needs to be smaller than int32_t max; otherwise, please use packed_accessor64", LIMIT),
    ("cublas dimensions", RUN, "blas::gemm<float> argument m must be non-negative and less than 2147483647 but got 4294967296", LIMIT),
    ("mps dimensions", RUN, "MPSGraph does not support tensor dims larger than INT_MAX", LIMIT),
    ("cuda grid", ACCELERATOR, "CUDA error: invalid configuration argument", LIMIT),
    ("hip grid", RUN, "HIP error: invalid configuration argument", LIMIT),
    # What is not memory although it may read like it.
    ("1 EB", TORCH, "CUDA out of memory. Tried to allocate more than 1EB memory.", None),
    ("triton, own type", OutOfResources, "out of resource: shared memory, Required: 180224, Hardware limit: 101376.", None),
    ("triton", RUN, "out of resource: shared memory, Required: 180224, Hardware limit: 101376.", None),
    ("inductor", RUN, "No valid triton configs. OutOfMemoryError: out of resource: triton_mm Required: 524288", None),
    ("cuda registers", ACCELERATOR, "CUDA error: too many resources requested for launch", None),
    ("device assert", ACCELERATOR, "CUDA error: device-side assert triggered", None),
    ("illegal address", ACCELERATOR, "CUDA error: an illegal memory access was encountered", None),
    ("misaligned address", RUN, "CUDA error: misaligned address", None),
    ("no kernel", RUN, "CUDA error: no kernel image is available for execution on the device", None),
    ("nvml elsewhere", RUN, 'NVML_SUCCESS == DriverAPI::get()->nvmlInit_v2_() INTERNAL ASSERT FAILED at "PeerToPeerAccess.cpp":83', None),
    ("shapes", RUN, "mat1 and mat2 shapes cannot be multiplied (4x5 and 3x2)", None),
    ("memory layout", RUN, "view size is not compatible with input tensor's size; call .contiguous() to use the same memory", None),
    ("memory format", RUN, "memory format option is only supported by strided tensors", None),
    ("replay memory", RUN, "the replay memory is empty", None),
    ("a model's memory", RUN, "the memory bank ran out of entries: out of memory slots", None),
    ("cudnn, unsupported", RUN, "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", None),
    ("cudnn, execution", RUN, "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", None),
    ("nccl, a peer", DIST, "NCCL error: remote process exited or there was a network error", None),
    ("data loader, segfault", RUN, "DataLoader worker (pid 7) is killed by signal: Segmentation fault.", None),
    ("data loader, descriptors", RUN, "unable to open shared memory object </torch_1_2_3>: Too many open files (24)", None),
    ("a full disk", OSError, "[Errno 28] No space left on device", None),
    ("value error", ValueError, "CUDA out of memory. Tried to allocate 20.00 MiB", None),
    ("missing key", KeyError, "CUDA out of memory", None),
    ("assertion", AssertionError, "out of memory", None),
    ("user's own type", type("BudgetError", (Exception,), {}), "CUDA out of memory", None),
]  # fmt: skip

# In doubt: the library has other reasons to say this, so it counts only where the same step ran with fewer rows.
DOUBTFUL: list[tuple[str, str]] = [
    ("cublas handle", "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    ("cudnn engines", "GET was unable to find an engine to execute this computation"),
    ("cudnn handle", "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
]

STICKY: list[str] = [
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: device-side assert triggered",
    "CUDA error: misaligned address",
    "CUDA error: an illegal instruction was encountered",
    "CUDA error: hardware stack error",
    "CUDA error: invalid program counter",
    "CUDA error: operation not supported on global/shared address space",
    "CUDA error: unspecified launch failure",
    "CUDA error: the launch timed out and was terminated",
    "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: uncorrectable NVLink error detected during the execution",
    "Triton Error [CUDA]: an illegal memory access was encountered",
    "HIP error: an illegal memory access was encountered",
]  # fmt: skip


@pytest.mark.parametrize(("source", "kind", "message", "outcome"), ROWS, ids=[row[0] for row in ROWS])
def test_each_message_is_known_for_what_it_is(source: str, kind: type[BaseException], message: str, outcome: Outcome | None) -> None:
    error = kind(message)
    assert classify(error) is outcome
    assert classify(error, ran_before=True) is outcome
    on_cpu = Outcome.OOM if outcome is HOST else outcome
    assert classify(error, on_cpu=True) is on_cpu


@pytest.mark.parametrize(("source", "message"), DOUBTFUL, ids=[row[0] for row in DOUBTFUL])
def test_a_message_in_doubt_is_memory_only_where_the_step_ran_before(source: str, message: str) -> None:
    assert classify(RuntimeError(message)) is None
    assert classify(RuntimeError(message), ran_before=True) is OOM


def test_the_table_has_a_row_of_its_own_for_every_source() -> None:
    assert len(ROWS) >= 45
    assert len({source for source, *_ in ROWS}) == len(ROWS)


def test_every_sign_has_a_message_that_it_decides() -> None:
    messages = [message for *_, message, _ in ROWS] + [message for _, message in DOUBTFUL]
    decided = {next((s.pattern for s in SIGNS if s.matches(message)), None) for message in messages}
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


def test_several_arguments_are_looked_into() -> None:
    assert classify(RuntimeError("rank 3", "CUDA error: out of memory")) is OOM


class PackagedGroup(Exception):
    """A group as packages for Python 3.10 have it."""

    def __init__(self, message: str, exceptions: list[Any]) -> None:
        super().__init__(message)
        self.exceptions = exceptions


GROUPS = [PackagedGroup, *([builtins.ExceptionGroup] if sys.version_info >= (3, 11) else [])]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_groups_are_looked_into_however_deep(group: Any) -> None:
    out, other = RuntimeError("CUDA error: out of memory"), ValueError("x")
    assert classify(group("tasks", [other, out])) is OOM
    assert classify(group("tasks", [other, group("inner", [KeyError("CUDA out of memory"), out])])) is OOM
    assert classify(group("tasks", [other, group("inner", [KeyError("CUDA out of memory")])])) is None
    assert is_sticky(group("tasks", [out, group("inner", [RuntimeError(STICKY[0])])]))
    wrapped = raised(lambda: _raise_from(ValueError("epoch 3"), group("tasks", [out])))
    assert classify(wrapped) is OOM


def _raise_from(error: Exception, cause: Exception) -> None:
    raise error from cause


def test_an_attribute_called_exceptions_need_not_hold_any() -> None:
    assert classify(PackagedGroup("a package's own", ["timeout", 3])) is None
    assert classify(PackagedGroup("a package's own", None)) is None  # type: ignore[arg-type]


def test_a_chain_that_bites_its_tail_ends() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__context__ = second, first
    assert len(list(chain(first))) == 2
    assert classify(first) is None


def test_errors_of_worker_threads_are_known() -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as workers:
        assert classify(raised(workers.submit(torch.empty, 2**55).result)) is HOST
        assert classify(raised(workers.submit(bytearray, 2**62).result)) is HOST
        assert classify(raised(workers.submit(int, "CUDA out of memory").result)) is None


class TwoArguments(Exception):
    """An error that cannot be made from its text alone."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message, code)


class Rows(Dataset[Any]):
    """Raises for the first row what it was given."""

    def __init__(self, error: Any) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.error, int):
            return torch.empty(self.error)
        if isinstance(self.error, TwoArguments):
            try:
                bytearray(2**62)
            except MemoryError as error:
                raise self.error from error
        raise self.error  # not CUDA out of memory: a traceback shows this line whatever the error is


LOADED: list[tuple[Any, Outcome | None]] = [
    (MemoryError("row 3"), HOST),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), OOM),
    (2**55, HOST),
    (TwoArguments("row 3", 7), HOST),
    (OSError(12, "Cannot allocate memory"), HOST),
    (RuntimeError("a bad row"), None),
    (KeyError("CUDA out of memory"), None),
]


@pytest.mark.parametrize(("error", "outcome"), LOADED, ids=lambda value: repr(value)[:30])
def test_what_a_data_loaders_worker_raises_is_known(error: Any, outcome: Outcome | None) -> None:
    """A real worker process; its error comes back as the text of a traceback."""
    loader: Any = iter(DataLoader(Rows(error), num_workers=1, timeout=60))
    caught = raised(lambda: next(loader))
    loader._shutdown_workers()
    assert "in DataLoader worker process 0" in str(caught)
    assert classify(caught) is outcome
    assert not is_sticky(caught)


def carried(*lines: str) -> RuntimeError:
    return RuntimeError("Caught SomeError in replica 1 on device 1.\nOriginal Traceback (most recent call last):\n" + "\n".join(lines))


FRAME = '  File "train.py", line 3, in step\n    check("CUDA out of memory", bytes)  # CUDA error: device-side assert triggered'


@pytest.mark.parametrize(
    ("lines", "outcome", "sticky"),
    [
        (["RuntimeError: bad row"], None, False),
        (["RuntimeError: CUDA error: out of memory", "CUDA kernel errors might be reported later"], OOM, False),
        (["torch.OutOfMemoryError: a wording of the future"], OOM, False),
        (["torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate more than 1EB memory."], None, False),
        (["numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7 GiB"], HOST, False),
        (["MemoryError"], HOST, False),
        (["KeyError: 'CUDA out of memory'"], None, False),
        (["mine.BudgetError: (9, 'batch')", "", "The above exception was the direct cause of the following exception:"], None, False),
        (["torch.AcceleratorError: CUDA error: an illegal memory access was encountered"], None, True),
    ],
)
def test_only_the_errors_of_a_carried_traceback_count_not_its_lines(lines: list[str], outcome: Outcome | None, sticky: bool) -> None:
    error = carried(FRAME, *lines)
    assert classify(error) is outcome
    assert is_sticky(error) is sticky


def test_each_error_of_a_carried_chain_counts() -> None:
    chained = ["ValueError: epoch 3", "", "During handling of the above exception, another exception occurred:", ""]
    again = ["Traceback (most recent call last):", FRAME, "RuntimeError: CUDA error: out of memory"]
    assert classify(carried(FRAME, *chained, *again)) is OOM
    group = [f"  | {line}" for line in ("Traceback (most recent call last):", FRAME.replace("\n", "\n  | "), "MemoryError")]
    assert classify(carried(FRAME, "ExceptionGroup: two (2 sub-exceptions)", *group)) is HOST
    assert classify(RuntimeError("a truncated Traceback (most recent call last):")) is None


@pytest.mark.parametrize("message", STICKY)
def test_errors_that_end_the_process_for_the_gpu_are_sticky(message: str) -> None:
    error = ACCELERATOR_ERROR(f"{message}\nCUDA kernel errors might be asynchronously reported at some other API call")
    assert is_sticky(error)
    assert is_sticky(raised(lambda: _raise_from(ValueError("the step failed"), error)))
    assert classify(error) is None


def test_an_error_number_of_torch_2_9_decides_too() -> None:
    error = ACCELERATOR_ERROR("CUDA error: a wording of the future")
    assert not is_sticky(error)
    error.error_code = 719  # type: ignore[attr-defined]
    assert is_sticky(error)


def test_what_leaves_the_process_usable_is_not_sticky() -> None:
    for source, kind, message, outcome in ROWS:
        if outcome is not None:
            assert not is_sticky(kind(message)), source
    assert not is_sticky(ValueError("illegal memory access"))


def test_memory_that_ran_out_before_a_sticky_error_does_not_hide_it() -> None:
    error = RuntimeError(STICKY[0])
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    assert is_sticky(error)
    assert classify(error) is None


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


@pytest.mark.parametrize("said", ["could not create a primitive descriptor for a matmul primitive", "could not execute a primitive"])
def test_what_onednn_says_is_memory_where_the_step_ran_with_fewer_rows(said: str) -> None:
    device = CpuDevice()
    assert device.classify(RuntimeError(said), ran_before=True) is Outcome.OOM
    assert device.classify(RuntimeError("could not open a file"), ran_before=True) is None
