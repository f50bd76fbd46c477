"""Validation loss during training."""

import torch

from gpt2.data.sampler import windows
from gpt2.data.token_files import Tokens
from gpt2.progress import ProgressCallback, no_progress
from gpt2.training.mixed_precision import MixedPrecisionModel


@torch.no_grad()
def validation_loss(
    model: MixedPrecisionModel,
    tokens: Tokens,
    *,
    sequence_length: int,
    batch_size: int,
    progress: ProgressCallback = no_progress,
) -> float:
    """Mean loss in nats per token over every token of a split but the first, in windows of `sequence_length`."""
    device = model.device
    total = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)  # MPS has no float64
    for inputs, targets in windows(tokens, sequence_length, batch_size):
        loss = model.loss(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device))
        total += loss.to(total.device).double() * targets.size
        progress(targets.size)
    return total.item() / (len(tokens) - 1)
