"""Loss, perplexity, bits per byte and accuracy of a model on held-out text."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

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
from gpt2.tokenizer import END_OF_TEXT, token_bytes


@dataclass(frozen=True)
class Scores:
    """Scores of a model on a text. loss: nats per token. topk_accuracy: share of tokens among the k likeliest.

    bits_per_byte and bytes leave `<|endoftext|>` out: it is no text.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    top1_accuracy: float
    top5_accuracy: float
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Predictions:
    """What a model predicted for the targets of a batch; all (B, T).

    losses: nats. ranks: number of tokens that are likelier than the target. confidences: probability of the likeliest
    token.
    """

    targets: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int64]
    confidences: npt.NDArray[np.float32]


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Loss per byte of text, which is comparable across tokenizers."""
    return total_nats / math.log(2) / num_bytes


@cache
def byte_lengths() -> npt.NDArray[np.int64]:
    """The number of bytes of text of each token; 0 for `<|endoftext|>`."""
    lengths = np.array([len(token_bytes(token)) for token in range(GPT2_VOCAB_SIZE)])
    lengths[END_OF_TEXT] = 0
    return lengths


def predictions(model: GPT, tokens: Tokens, *, sequence_length: int, batch_size: int) -> Iterator[Predictions]:
    """The predictions of every token but the first, in windows of `sequence_length`, in the dtype of the model."""
    for inputs, targets in windows(tokens, sequence_length, batch_size):
        with torch.no_grad():
            target = _on(model.device, targets)[:, :, None]  # (B, T, 1)
            logits, _ = model(_on(model.device, inputs))  # (B, T, V)
            ranks = (logits > logits.gather(2, target)).sum(dim=2)
            log_probabilities = F.log_softmax(logits.float(), dim=2)
            losses = -log_probabilities.gather(2, target)[:, :, 0]
            confidences = log_probabilities.amax(dim=2).exp()
        yield Predictions(targets, losses.cpu().numpy(), ranks.cpu().numpy(), confidences.cpu().numpy())


def score(
    model: GPT,
    tokens: Tokens,
    *,
    sequence_length: int,
    batch_size: int,
    observe: Callable[[Predictions], object] | None = None,
    progress: ProgressCallback = no_progress,
) -> Scores:
    """The scores over every token but the first, in windows of `sequence_length`, in the dtype of the model.

    observe: called with the predictions of each batch, in the order of the text.
    """
    total_nats, text_nats, num_bytes, top1, top5 = 0.0, 0.0, 0, 0, 0
    for batch in predictions(model, tokens, sequence_length=sequence_length, batch_size=batch_size):
        lengths = byte_lengths()[batch.targets]
        losses = batch.losses.astype(np.float64)
        total_nats += float(losses.sum())
        text_nats += float(losses[lengths > 0].sum())
        num_bytes += int(lengths.sum())
        top1 += int((batch.ranks < 1).sum())
        top5 += int((batch.ranks < 5).sum())
        if observe is not None:
            observe(batch)
        progress(batch.targets.size)
    num_targets = len(tokens) - 1
    loss = total_nats / num_targets
    return Scores(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # exp overflows above
        bits_per_byte=bits_per_byte(text_nats, num_bytes),
        top1_accuracy=top1 / num_targets,
        top5_accuracy=top5 / num_targets,
        tokens=num_targets,
        bytes=num_bytes,
    )


def token_losses(model: GPT, tokens: Tokens, *, sequence_length: int) -> npt.NDArray[np.float32]:
    """The loss of each token of a passage but the first, in nats: (len(tokens) - 1,)."""
    batches = predictions(model, tokens, sequence_length=sequence_length, batch_size=1)
    return np.concatenate([batch.losses[0] for batch in batches])


def _on(device: torch.device, batch: npt.NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(batch).to(device)
