"""Loss, perplexity, bits per byte and accuracy of a model on held-out text."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.config import GPT2_VOCAB_SIZE
from gpt2.data.sampler import windows
from gpt2.data.token_files import Tokens
from gpt2.model.transformer import GPT
from gpt2.progress import ProgressCallback, no_progress
from gpt2.tokenizer import token_bytes


@dataclass(frozen=True)
class Scores:
    """Scores of a model on a text. loss: nats per token. topk_accuracy: share of tokens among the k likeliest."""

    loss: float
    perplexity: float
    bits_per_byte: float
    top1_accuracy: float
    top5_accuracy: float
    tokens: int
    bytes: int


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Loss per byte of text, which is comparable across tokenizers."""
    return total_nats / math.log(2) / num_bytes


def _on(device: torch.device, batch: npt.NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(batch).to(device)


@torch.no_grad()
def score(
    model: GPT,
    tokens: Tokens,
    *,
    sequence_length: int,
    batch_size: int,
    progress: ProgressCallback = no_progress,
) -> Scores:
    """The scores over every token but the first, in windows of `sequence_length`, in the dtype of the model."""
    total_nats, top1, top5 = 0.0, 0, 0
    counts = np.zeros(GPT2_VOCAB_SIZE, dtype=np.int64)  # of each token among the targets
    for inputs, targets in windows(tokens, sequence_length, batch_size):
        y = _on(model.device, targets)  # (B, T)
        logits, loss = model(_on(model.device, inputs), y)  # (B, T, V)
        likelier = (logits > logits.gather(2, y[:, :, None])).sum(dim=2)  # rank of the target
        total_nats += loss.item() * targets.size
        top1 += int((likelier < 1).sum())
        top5 += int((likelier < 5).sum())
        counts += np.bincount(targets.ravel(), minlength=len(counts))
        progress(targets.size)
    num_targets = len(tokens) - 1
    num_bytes = sum(len(token_bytes(int(token))) * int(counts[token]) for token in np.flatnonzero(counts))
    loss = total_nats / num_targets
    return Scores(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # exp overflows above
        bits_per_byte=bits_per_byte(total_nats, num_bytes),
        top1_accuracy=top1 / num_targets,
        top5_accuracy=top5 / num_targets,
        tokens=num_targets,
        bytes=num_bytes,
    )


@torch.no_grad()
def token_losses(model: GPT, tokens: Tokens, *, sequence_length: int) -> npt.NDArray[np.float32]:
    """The loss of each token of a passage but the first, in nats: (len(tokens) - 1,)."""
    losses = []
    for inputs, targets in windows(tokens, sequence_length, batch_size=1):
        logits, _ = model(_on(model.device, inputs))
        losses.append(F.cross_entropy(logits[0].float(), _on(model.device, targets)[0], reduction="none").cpu().numpy())
    return np.concatenate(losses)
