"""Questions with several endings, of which the model has to find the likeliest: HellaSwag, ARC, PIQA and the like.

The scoring is that of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness): a test holds both
against each other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from gpt2 import tokenizer
from gpt2.errors import UserError
from gpt2.model.transformer import GPT
from gpt2.progress import ProgressCallback, no_progress


@dataclass(frozen=True)
class Question:
    """A context and its possible endings, which follow it after a space. answer: index of the right one."""

    context: str
    endings: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Accuracy:
    """Shares of questions whose right ending has the highest log-probability, and their standard errors.

    acc: by the sum over its tokens. acc_norm: by that sum for each character of the ending (HellaSwag's measure,
    https://arxiv.org/abs/1905.07830).
    """

    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    questions: int


def accuracy(questions: Sequence[Question], logprobs: Sequence[npt.NDArray[np.float64]]) -> Accuracy:
    """The accuracy, given the log-probability of each ending of each question."""
    right = np.empty((2, len(questions)))
    for number, (question, sums) in enumerate(zip(questions, logprobs, strict=True)):
        lengths = [len(ending) for ending in question.endings]
        right[:, number] = [np.argmax(sums) == question.answer, np.argmax(sums / lengths) == question.answer]
    acc, acc_norm = right.mean(axis=1).tolist()
    # of a mean; one question has none
    errors = right.std(axis=1, ddof=min(1, len(questions) - 1)) / math.sqrt(len(questions))
    return Accuracy(acc, float(errors[0]), acc_norm, float(errors[1]), len(questions))


def score_endings(
    model: GPT,
    questions: Sequence[Question],
    *,
    context_length: int,
    batch_size: int,
    progress: ProgressCallback = no_progress,
) -> list[npt.NDArray[np.float64]]:
    """The log-probability of each ending of each question, in nats.

    A context that is too long loses its beginning. Raises UserError if an ending alone does not fit the context.
    progress: counts endings.
    """
    pairs = [_encode(question.context, " " + ending) for question in questions for ending in question.endings]
    for _, ending in pairs:
        if len(ending) > context_length:
            raise UserError(f"an ending has {len(ending)} tokens, and the context of the model {context_length}")
    logprobs = np.empty(len(pairs))
    order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index][0]) - len(pairs[index][1]))
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        logprobs[indices] = _score_batch(model, [pairs[index] for index in indices], context_length)
        progress(len(indices))
    ends = np.cumsum([len(question.endings) for question in questions])
    return np.split(logprobs, ends[:-1])


def _encode(context: str, ending: str) -> tuple[list[int], list[int]]:
    """The tokens of a context and of its ending. An empty context is `<|endoftext|>`."""
    if not context:
        return [tokenizer.END_OF_TEXT], tokenizer.encode(ending)
    tokens = tokenizer.encode(context)
    return tokens, tokenizer.encode(context + ending)[len(tokens) :]


@torch.no_grad()
def _score_batch(
    model: GPT, pairs: Sequence[tuple[list[int], list[int]]], context_length: int
) -> npt.NDArray[np.float64]:
    """The log-probability of each ending after its context."""
    rows = [(context + ending)[-context_length - 1 :] for context, ending in pairs]
    T = max(map(len, rows)) - 1
    inputs, targets = np.zeros((2, len(rows), T), dtype=np.int64)
    of_ending = np.zeros((len(rows), T), dtype=np.bool_)
    for number, (row, (_, ending)) in enumerate(zip(rows, pairs, strict=True)):
        end = len(row) - 1
        inputs[number, :end], targets[number, :end] = row[:-1], row[1:]  # causal: the padding comes after
        of_ending[number, end - len(ending) : end] = True
    chosen = torch.from_numpy(of_ending).to(model.device)
    hidden = model.hidden(torch.from_numpy(inputs).to(model.device))[chosen]  # (tokens of endings, C)
    losses = F.cross_entropy(
        model.lm_head(hidden).float(), torch.from_numpy(targets).to(model.device)[chosen], reduction="none"
    )
    row_of_token, _ = np.nonzero(of_ending)
    return -np.bincount(row_of_token, losses.cpu().double().numpy(), len(rows)).astype(np.float64)
