"""The parts of a run that depend on the number of its processes. With one process they are those of `gpt2.training`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from gpt2.config import GPTConfig, TrainConfig
from gpt2.files import write_json
from gpt2.memory import training_bytes
from gpt2.model.transformer import GPT
from gpt2.optimizers.optimizer import Optimizer
from gpt2.training.checkpoints import CheckpointStore
from gpt2.training.mixed_precision import MixedPrecisionModel
from gpt2.training.state import TrainState, restore_checkpoint
from gpt2.world import World

if TYPE_CHECKING:
    from gpt2.distributed.checkpoints import ShardedWriter

# The modules beside this one take a second to import; one process needs them only to read checkpoints of several.
Strategy = Literal["ddp", "fsdp"]
Writer: TypeAlias = "CheckpointStore | ShardedWriter"
MICRO_BATCH_FILE = "micro-batch.json"


def choose_strategy(
    name: Literal["auto", "ddp", "fsdp"],
    model: GPTConfig,
    config: TrainConfig,
    device: torch.device,
    precision: torch.dtype,
    world: World,
    memory_bytes: int,
) -> Strategy:
    """`auto` is FSDP where training on one sequence does not fit one device, and DDP otherwise, which sends less.

    memory_bytes: of this machine; that of a GPU is known.
    """
    if name != "auto":
        return name
    if world.size == 1:
        return "ddp"
    on_cpu = device.type != "cuda"
    memory = memory_bytes // world.local_size if on_cpu else torch.cuda.get_device_properties(device).total_memory
    needed = training_bytes(
        model,
        1,
        config.sequence_length,
        reduced_precision=precision != torch.float32,
        on_cpu=on_cpu,
        dropout=config.dropout > 0,
        freeze_layers=config.freeze_layers,
    )
    return "fsdp" if world.any(needed > memory) else "ddp"


def remember_micro_batch(folder: Path, world: World, size: int) -> None:
    """Notes the largest micro-batch that so many processes have memory for, for when they start again."""
    write_json(folder / MICRO_BATCH_FILE, {"processes": world.size, "micro_batch_size": size})


def known_micro_batch(folder: Path, world: World) -> int:
    """What `remember_micro_batch` noted for as many processes; else a number larger than any."""
    try:
        noted = json.loads((folder / MICRO_BATCH_FILE).read_text(encoding="utf-8"))
        if noted["processes"] == world.size:
            return int(noted["micro_batch_size"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 2**31


def make_model(
    master: GPT, dtype: torch.dtype, world: World, strategy: Strategy, **options: Any
) -> MixedPrecisionModel:
    """The model with its compute copy. To be called before the optimizer is made: FSDP replaces the parameters.

    options: those of MixedPrecisionModel.
    """
    if world.size == 1:
        return MixedPrecisionModel(master, dtype, **options)
    from gpt2.distributed.models import DataParallelModel, FullyShardedModel

    kind = FullyShardedModel if strategy == "fsdp" else DataParallelModel
    return kind(master, dtype, world, **options)


def make_optimizer(model: MixedPrecisionModel, config: TrainConfig, world: World) -> Optimizer:
    """The optimizer of the master weights."""
    if world.size == 1:
        return Optimizer(model.master, config, dtype=model.dtype)
    from gpt2.distributed.muon import DistributedMuon

    return Optimizer(model.master, config, partial(DistributedMuon, world=world), model.dtype)


def make_writer(store: CheckpointStore, optimizer: Optimizer, world: World, device: torch.device) -> Writer:
    """What saves the checkpoints of a store."""
    if world.size == 1:
        return store
    from gpt2.distributed.checkpoints import ShardedWriter

    return ShardedWriter(store, optimizer, world, device)


def restore(
    content: dict[str, Any], folder: Path, model: MixedPrecisionModel, optimizer: Optimizer, world: World
) -> TrainState:
    """Loads a checkpoint of any number of processes. Returns the state to continue from.

    content: what `CheckpointStore.load` returned for this folder. Raises FileError if it cannot be read.
    """
    if world.size == 1 and "model_state_dict" in content:
        return restore_checkpoint(content, model.master, optimizer)
    from gpt2.distributed import checkpoints

    return checkpoints.restore(content, folder, model, optimizer, world)
