"""Which device computes, in which number format, and how memory is taken."""

import ctypes
import sys
import time
from typing import Literal

import torch

from gpt2.errors import UserError

DeviceName = Literal["auto", "cuda", "mps", "cpu"]
PrecisionName = Literal["auto", "fp32", "bf16"]
PROBE_SIZE = 1024
WORTHWHILE_SPEEDUP = 1.5


def choose_device(name: DeviceName) -> torch.device:
    """The device of this name; `auto` is the first of CUDA, MPS and CPU that is there.

    Raises UserError if it is not there.
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
        raise UserError(f"runtime.device is {name!r}, but this machine and this torch have only: {usable}")
    return torch.device(name)


def choose_precision(device: torch.device, name: PrecisionName) -> torch.dtype:
    """The format of matrix products: torch.float32 or torch.bfloat16.

    `auto` takes bfloat16 where a short measurement shows it to be at least 1.5 times as fast; many processors accept
    it and are slower at it.
    """
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if supported else torch.float32
    if device.type == "mps":
        return torch.float32
    speedup = _matmul_seconds(torch.float32) / _matmul_seconds(torch.bfloat16)
    return torch.bfloat16 if speedup >= WORTHWHILE_SPEEDUP else torch.float32


def _matmul_seconds(dtype: torch.dtype) -> float:
    """Best of three products of two matrices on the CPU."""
    a = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype)
    a @ a  # the first one sets up
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """A context in which matrix products run in `precision`; the weights stay fp32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def keep_freed_memory() -> None:
    """Lets glibc reuse large blocks instead of handing each back to the system.

    The logits of a batch are hundreds of megabytes; taking them anew at every step made page faults half of a step's
    time on the CPU. Does nothing where there is no glibc.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
