"""Losses of a model in training: of the validation split, and of a sample of the training text."""

from collections.abc import Iterator
from itertools import islice

import torch

from gpt2.data.sampler import Windows, spread_windows, windows
from gpt2.data.token_files import Tokens
from gpt2.progress import ProgressCallback, no_progress
from gpt2.training.mixed_precision import MixedPrecisionModel
from gpt2.world import ALONE, World


def validation_loss(
    model: MixedPrecisionModel,
    tokens: Tokens,
    *,
    sequence_length: int,
    batch_size: int,
    progress: ProgressCallback = no_progress,
    world: World = ALONE,
) -> float:
    """Mean loss in nats per token over every token of a split but the first, in windows of `sequence_length`."""
    return mean_loss(model, windows(tokens, sequence_length, batch_size), progress=progress, world=world)


def sample_loss(
    model: MixedPrecisionModel,
    tokens: Tokens,
    num_tokens: int,
    *,
    sequence_length: int,
    batch_size: int,
    progress: ProgressCallback = no_progress,
    world: World = ALONE,
) -> float:
    """Mean loss in nats per token over about `num_tokens` of a split, in windows that are spread evenly over it."""
    batches = spread_windows(tokens, sequence_length, batch_size, max(1, num_tokens // sequence_length))
    return mean_loss(model, batches, progress=progress, world=world)


@torch.no_grad()
def mean_loss(
    model: MixedPrecisionModel,
    batches: Iterator[Windows],
    *,
    progress: ProgressCallback = no_progress,
    world: World = ALONE,
) -> float:
    """Mean loss in nats per token over all targets of the batches, which are the same in all processes.

    Several processes take the batches in turn, and call `progress` equally often.
    """
    device = model.device
    num_targets = 0
    total = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)  # MPS has no float64
    while turn := list(islice(batches, world.size)):
        # sharded weights are gathered by all processes, so one without a batch computes the last one for nothing
        inputs, targets = turn[min(world.rank, len(turn) - 1)]
        loss = model.loss(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device))
        if world.rank < len(turn):
            total += loss.to(total.device).double() * targets.size
        turn_targets = sum(targets.size for _, targets in turn)
        num_targets += turn_targets
        progress(turn_targets)
    return world.sum(total.item()) / num_targets
