"""How good a model is on text that it was not trained on, and how much of what it writes it knows by heart."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.compute import Compute
from gpt2.data import Tokens, windows
from gpt2.model import GPT
from gpt2.progress import Progress, unseen
from gpt2.tokenizer import token_bytes


@dataclass(frozen=True)
class Scores:
    """Of a model on a text. loss: nats per token. Accuracies: the share of tokens that were the 1 or 5 likeliest."""

    loss: float
    perplexity: float
    bits_per_byte: float
    top1_accuracy: float
    top5_accuracy: float
    tokens: int
    bytes: int


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Loss that can be compared across tokenizers: bits needed for a byte of the text."""
    return total_nats / math.log(2) / num_bytes


def _on(device: torch.device, batch: npt.NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(batch).to(device)


@torch.no_grad()
def validation_loss(
    compute: Compute, tokens: Tokens, *, sequence_length: int, batch_size: int, progress: Progress = unseen
) -> float:
    """Mean loss in nats over every token of a split but the first, in windows of `sequence_length`."""
    device = compute.model.device
    total = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)  # MPS has no float64
    for inputs, targets in windows(tokens, sequence_length, batch_size):
        loss = compute.loss(_on(device, inputs), _on(device, targets))
        total += loss.to(total.device).double() * targets.size
        progress(targets.size)
    return total.item() / (len(tokens) - 1)


@torch.no_grad()
def score(
    model: GPT,
    tokens: Tokens,
    *,
    sequence_length: int,
    batch_size: int,
    progress: Progress = unseen,
) -> Scores:
    """All the scores, on the windows of `validation_loss`, in the format that the model is in."""
    total_nats, top1, top5 = 0.0, 0, 0
    for inputs, targets in windows(tokens, sequence_length, batch_size):
        y = _on(model.device, targets)  # (B, T)
        logits, loss = model(_on(model.device, inputs), y)  # (B, T, V)
        likelier = (logits > logits.gather(2, y[:, :, None])).sum(dim=2)  # how many tokens beat the right one
        total_nats += loss.item() * targets.size
        top1 += int((likelier < 1).sum())
        top5 += int((likelier < 5).sum())
        progress(targets.size)
    num_targets = len(tokens) - 1
    num_bytes = sum(
        len(token_bytes(int(token))) * int(count)
        for token, count in zip(*np.unique(tokens[1:], return_counts=True), strict=True)
    )
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


SEED_BYTES = 8
STRETCH_TOKENS = 1 << 20


def longest_verbatim(samples: list[str], tokens: Tokens, *, progress: Progress = unseen) -> str:
    """The longest passage of the samples that stands in the text of `tokens`, to the letter; "" for under 8 bytes.

    Each place that shares 8 bytes with a sample is looked at, a stretch of the text at a time.
    """
    texts = [sample.encode() for sample in samples]
    places: dict[int, list[tuple[bytes, int]]] = {}
    for text in texts:
        for start, gram in enumerate(_grams(np.frombuffer(text, dtype=np.uint8)).tolist()):
            places.setdefault(gram, []).append((text, start))
    wanted = np.array(sorted(places), dtype=np.uint64)
    reach = max([1, *map(len, texts)])  # no passage is longer
    best = b""
    tail = b""
    for first in range(0, len(tokens), STRETCH_TOKENS):
        stretch = tokens[first : first + STRETCH_TOKENS]
        training = tail + b"".join([token_bytes(int(token)) for token in stretch])
        tail = training[-reach:]
        grams = _grams(np.frombuffer(training, dtype=np.uint8))
        for place in np.flatnonzero(np.isin(grams, wanted)).tolist():
            for text, start in places[int(grams[place])]:
                length = len(best) + 1
                if len(text) - start < length or training[place : place + length] != text[start : start + length]:
                    continue
                while (
                    start + length < len(text)
                    and training[place + length : place + length + 1] == text[start + length : start + length + 1]
                ):
                    length += 1
                best = text[start : start + length]
        progress(len(stretch))
    return best.decode(errors="ignore") if len(best) >= SEED_BYTES else ""


def _grams(text: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Each run of 8 bytes of a text as a number: (len(text) - 7,), none for a shorter text."""
    count = max(0, len(text) - SEED_BYTES + 1)
    grams = np.zeros(count, dtype=np.uint64)
    for i in range(SEED_BYTES):
        grams = (grams << np.uint64(8)) | text[i : i + count].astype(np.uint64)
    return grams
