"""Validation loss during training."""

from itertools import islice

import torch

from gpt2.data.sampler import windows
from gpt2.data.token_files import Tokens
from gpt2.progress import ProgressCallback, no_progress
from gpt2.training.mixed_precision import MixedPrecisionModel
from gpt2.world import ALONE, World


@torch.no_grad()
def validation_loss(
    model: MixedPrecisionModel,
    tokens: Tokens,
    *,
    sequence_length: int,
    batch_size: int,
    progress: ProgressCallback = no_progress,
    world: World = ALONE,
) -> float:
    """Mean loss in nats per token over every token of a split but the first, in windows of `sequence_length`.

    Several processes take the batches in turn, and call `progress` equally often.
    """
    device = model.device
    total = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)  # MPS has no float64
    batches = windows(tokens, sequence_length, batch_size)
    while turn := list(islice(batches, world.size)):
        # sharded weights are gathered by all processes, so one without a batch computes the last one for nothing
        inputs, targets = turn[min(world.rank, len(turn) - 1)]
        loss = model.loss(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device))
        if world.rank < len(turn):
            total += loss.to(total.device).double() * targets.size
        progress(sum(targets.size for _, targets in turn))
    return world.sum(total.item()) / (len(tokens) - 1)
