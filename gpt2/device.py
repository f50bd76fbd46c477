"""Device, precision, peak FLOP/s and memory of this machine."""

import ctypes
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch

from gpt2.errors import UserError
from gpt2.files import write_json

DeviceName = Literal["auto", "cuda", "mps", "cpu"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROBE_SIZE = {"cuda": 8192, "mps": 2048, "cpu": 2048}
Measured = TypeVar("Measured", float, str)
MIN_BF16_SPEEDUP = {256: 1.0, 1024: 1.5}
"""Minimum speed-up of bf16 over fp32 on a CPU, by matrix size."""


def choose_device(name: DeviceName) -> torch.device:
    """The device of this name; `auto` is the first available of CUDA, MPS and CPU.

    Raises UserError if it is not available.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(candidate for candidate in ("cuda", "mps", "cpu") if available[candidate])
    if not available[name]:
        usable = ", ".join(n for n, there in available.items() if there)
        raise UserError(f"runtime.device is {name!r}, which is not available here; available: {usable}")
    return torch.device(name)


def choose_precision(device: torch.device, name: PrecisionName) -> torch.dtype:
    """The dtype of matrix products: torch.float32, torch.bfloat16 or torch.float16.

    `auto` on a CPU chooses bfloat16 if a short measurement shows that it is at least 1.5 times as fast; many processors
    accept it and are slower with it. On CUDA it chooses bfloat16 if the hardware has it, and float16 otherwise.
    """
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float32
    return torch.bfloat16 if _is_bf16_fast() else torch.float32


def _is_bf16_fast() -> bool:
    """Whether the CPU is fast enough in bf16.

    Of one thread and its own time, so that other processes do not change the answer: a wall clock, and threads that
    wait for each other, gave another one now and then on a busy machine.
    """
    device, threads = torch.device("cpu"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # small sizes first: a large product takes seconds on a CPU without bf16 instructions
        return all(
            matmul_flops(device, torch.bfloat16, size, time.thread_time)
            >= worthwhile * matmul_flops(device, torch.float32, size, time.thread_time)
            for size, worthwhile in MIN_BF16_SPEEDUP.items()
        )
    finally:
        torch.set_num_threads(threads)


def matmul_flops(
    device: torch.device, dtype: torch.dtype, size: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """FLOP/s of a product of two square matrices of this size: the best of five.

    clock: in seconds. That of the thread leaves out the time that other processes take from it.
    """
    a = torch.ones(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(6):  # the first round warms up
        _synchronize(device)
        start_s = clock()
        a @ a
        _synchronize(device)
        seconds.append(clock() - start_s)
    return 2 * size**3 / min(seconds[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_flops(device: torch.device, dtype: torch.dtype, cache: Path) -> float:
    """The peak FLOP/s of matrix products on this machine in a dtype.

    Measured once for each machine, number of threads, dtype and version of torch; kept in the JSON file `cache`.
    """
    key = f"{device_name(device)}, {torch.get_num_threads()} threads, {dtype}, torch {torch.__version__}"
    return remembered(cache, key, lambda: matmul_flops(device, dtype, PROBE_SIZE[device.type]))


def remembered(cache: Path, key: str, measure: Callable[[], Measured]) -> Measured:
    """A number or a string that is measured once, and then kept under this key in the JSON file `cache`."""
    try:
        known = dict(json.loads(cache.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # missing or damaged
        known = {}
    value = known.get(key)
    if not isinstance(value, float | str):
        value = known[key] = measure()
        with suppress(OSError):  # the next process measures again
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, known)
    return cast(Measured, value)


def device_name(device: torch.device) -> str:
    """The name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def configure_device(device: torch.device, threads: int | None = None) -> None:
    """Sets up torch and the C library of this process for speed. threads: CPU threads; None is torch's default."""
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for fp32 products
    if device.type == "cpu":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Lets glibc reuse large blocks, in huge pages, instead of returning them to the operating system.

    A step allocates and frees gigabytes. Without this, page faults take half of a step's time on the CPU.
    Does nothing without glibc.
    """
    m_trim_threshold, m_mmap_max, madv_hugepage = -1, -4, 14  # from malloc.h and mman.h
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, -1)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # reserves address space for the heap; a page uses memory only after the first write to it
    page = os.sysconf("SC_PAGE_SIZE")
    size = page * os.sysconf("SC_PHYS_PAGES") // 2
    if start := libc.malloc(size):
        libc.madvise(-(-start // page) * page, size - page, madv_hugepage)
        libc.free(start)
