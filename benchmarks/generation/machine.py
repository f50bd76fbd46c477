"""The machine of a benchmark: its CPU, the limits on it, and its memory bandwidth."""

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INSTRUCTION_SETS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"),
    *("asimddp", "bf16", "i8mm", "sve"),  # of Arm
)
INSTRUCTION_LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "CT2_FORCE_CPU_ISA")
LIMITS = (*INSTRUCTION_LIMITS, "GPT2_OPTIMIZE")
"""Environment variables that keep a contender from using all that the CPU has."""
READ_MB = (32, 64, 96, 128, 192, 256, 512)
READ_S = 0.2


def describe(threads: int) -> tuple[str, dict[str, Any]]:
    """The name under which results of this machine are kept, and facts about it."""
    path = Path("/proc/cpuinfo")
    cpuinfo = path.read_text(encoding="utf-8") if path.exists() else ""
    found = instruction_sets(cpuinfo)
    name = f"{cpu_name(cpuinfo, os.environ)}, {threads} threads"
    read_gb_per_s = {str(size): round(read_bandwidth(size * 1_000_000) / 1e9, 1) for size in READ_MB}
    return name, {"instruction_sets": found, "read_gb_per_s": read_gb_per_s}


def cpu_name(cpuinfo: str, environment: Mapping[str, str]) -> str:
    """The CPU's name and model number, and the limits. Virtual machines give different CPUs the same name."""
    import torch

    from gpt2.device import device_name

    fields = _fields(cpuinfo)
    model = f" (family {fields['cpu family']}, model {fields['model']})" if "model" in fields else ""
    limits = [f"{name}={environment[name]}" for name in LIMITS if name in environment]
    return ", ".join([fields.get("model name", device_name(torch.device("cpu"))) + model, *limits])


def instruction_sets(cpuinfo: str) -> list[str]:
    """Those that matter for matrix products, from the content of /proc/cpuinfo."""
    fields = _fields(cpuinfo)
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return [name for name in INSTRUCTION_SETS if name in flags]


def _fields(cpuinfo: str) -> dict[str, str]:
    """The fields of the first processor."""
    lines = cpuinfo.strip().partition("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def read_bandwidth(num_bytes: int, seconds: float = READ_S) -> float:
    """Bytes/s at which all threads read the same bytes again and again: the best, as integers and as floats.

    What fits into a cache is read from there. seconds: for each way to read.
    """
    import torch

    block = torch.ones(num_bytes // 8, dtype=torch.int64)
    best_s = float("inf")
    for view in (block, block.view(torch.int32), block.view(torch.float32)):
        for read in (view.sum, view.max):
            end_s = time.perf_counter() + seconds
            while (start_s := time.perf_counter()) < end_s:
                read()
                best_s = min(best_s, time.perf_counter() - start_s)
    return num_bytes / best_s


def commit() -> str:
    """The commit of this project, and whether files differ from it."""
    found = subprocess.run(["git", "describe", "--always", "--dirty=, changed"], capture_output=True, text=True)
    return f"commit {found.stdout.strip()}" if found.returncode == 0 else "no commit"
