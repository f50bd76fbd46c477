"""Checks before a run starts that it fits into the memory and onto the disk of this machine.

They need only the params and milliseconds, and run before torch is imported.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2.errors import FileError, UserError
from gpt2.memory import GIB, largest_batch, training_bytes
from stages.params import Params, RuntimeConfig

ESTIMATE_ERROR = 1.2
"""Estimated and measured memory differ by at most this factor."""
CHECKPOINT_BYTES_PER_PARAMETER = 16
"""Weights, two moments, and the best weights, in fp32."""
CHECKPOINTS_AT_ONCE = 3
"""Two checkpoints, and the next one during its save."""
RESULT_BYTES_PER_PARAMETER = 24
"""Best and last weights, those of the Space and of dist/hf, and copies of some in DVC's cache."""
LESS = (
    "choose a smaller model or train.sequence_length, or set runtime.gradient_checkpointing; "
    "`python -m gpt2 info` shows what fits"
)


@dataclass(frozen=True)
class Plan:
    """A checked run. folder: of its checkpoints. micro_batch_size: the largest that fits into memory. identity: what,
    with the code, decides the numbers."""

    params: Params
    tokens_index: Mapping[str, Any]
    folder: Path
    micro_batch_size: int
    identity: Mapping[str, Any]


def micro_batch_that_fits(params: Params, local_processes: int = 1, processes: int = 1) -> int:
    """The micro-batch size of a process on a CPU: the largest that divides its batch and fits into its memory.

    local_processes: that share this machine's memory. Raises UserError if not even one sequence fits. On a GPU, whose
    memory is not known yet, returns the whole batch of the process.
    """
    config, share = params.model, params.train.share(processes)
    memory = memory_bytes() // local_processes
    at_least = 4 * config.num_parameters()  # of the weights; also of the best weights, which stay in memory
    if at_least > memory:
        raise UserError(f"the weights alone take {_gb(at_least)}, and this machine has {_gb(memory)} of memory: {LESS}")
    if may_use_gpu(params.runtime):
        return share.batch_size
    reduced_precision = params.runtime.precision != "fp32"
    checkpointing = params.runtime.gradient_checkpointing
    # what a process does not hold of weights, gradients and moments, if the model is sharded
    elsewhere = 16 * config.num_parameters() * (processes - 1) // processes
    for saved in {"ddp": [0], "fsdp": [elsewhere], "auto": [0, elsewhere]}[params.runtime.strategy]:
        limit = largest_batch(
            config,
            round(memory * ESTIMATE_ERROR) - at_least + saved,
            gradient_checkpointing=checkpointing,
            on_cpu=True,
            reduced_precision=reduced_precision,
            sequence_length=params.train.sequence_length,
            dropout=params.train.dropout > 0,
            freeze_layers=params.train.freeze_layers,
        )
        if fitting := share.micro_batch_size(limit):
            return fitting
    needed = training_bytes(
        config,
        1,
        params.train.sequence_length,
        reduced_precision=reduced_precision,
        gradient_checkpointing=checkpointing,
        dropout=params.train.dropout > 0,
        freeze_layers=params.train.freeze_layers,
    )
    raise UserError(
        f"training takes about {_gb(needed)} even with a micro-batch of one sequence, and this machine has "
        f"{_gb(memory)} of memory: {LESS}"
    )


def check_disk(params: Params, folder: Path) -> None:
    """Raises FileError if the checkpoints, in `folder`, and the results do not fit onto their disks."""
    parameters = params.model.num_parameters()
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    needs = {
        folder: max(0, CHECKPOINTS_AT_ONCE * CHECKPOINT_BYTES_PER_PARAMETER * parameters - there),
        Path.cwd(): RESULT_BYTES_PER_PARAMETER * parameters,
    }
    by_disk: dict[int, tuple[Path, int]] = {}
    for path, needed in needs.items():
        existing = next(each for each in (path, *path.parents) if each.exists())
        disk = existing.stat().st_dev
        by_disk[disk] = (existing, by_disk.get(disk, (existing, 0))[1] + needed)
    for existing, needed in by_disk.values():
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise FileError(
                f"checkpoints and results need about {_gb(needed)}, and the disk of {existing} has {_gb(free)} left: "
                "free disk space, or set runtime.checkpoint_folder to a folder on another disk"
            )


def memory_bytes() -> int:
    """Memory and swap of this machine, or the memory limit of the container if that is less."""
    import psutil

    total = psutil.virtual_memory().total + psutil.swap_memory().total
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no limit, or "max"
            continue
    return total


def may_use_gpu(runtime: RuntimeConfig) -> bool:
    """Whether torch could choose a GPU for these params."""
    return runtime.device in ("cuda", "mps") or (runtime.device == "auto" and may_have_gpu())


def may_have_gpu() -> bool:
    """Whether this machine may have a GPU; a guess without importing torch."""
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg") or sys.platform == "darwin"


def _gb(count: int) -> str:
    return f"{count / GIB:,.1f} GiB"
