"""Text from a model, token by token, with a key-value cache."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2.config import GPT2_VOCAB_SIZE
from gpt2.errors import UserError
from gpt2.model import GPT, LayerCache
from gpt2.tokenizer import END_OF_TEXT

BLANK_PROMPT = "\n"
"""What an empty prompt stands for: a model has to begin with something, and each text has line ends."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    temperature: 0 takes the likeliest. top_k: only among the k likeliest. top_p: only among the fewest likeliest that
    have this probability together (Holtzman et al., https://arxiv.org/abs/1904.09751).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}; expected a finite number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected more than 0 and at most 1")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What the next token is drawn from: (V,) from the logits of one position, (V,), in fp32.

    Ids beyond GPT-2's tokens, which a padded vocabulary may have, get 0.
    """
    logits = logits.float().clone()
    logits[GPT2_VOCAB_SIZE:] = -math.inf
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(0, logits.argmax(keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.numel():
        logits[logits < logits.topk(sampling.top_k).values[-1]] = -math.inf
    probs = logits.softmax(dim=0)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_probs, order = probs.sort(descending=True, stable=True)
        before = sorted_probs.cumsum(0) - sorted_probs  # probability of all that are likelier
        probs[order[before >= sampling.top_p]] = 0.0
        probs /= probs.sum()
    return probs


def prompts_from(text: str, count: int = 3, words: int = 3) -> list[str]:
    """The first words of lines from all over a text: prompts in its own manner, always the same."""
    lines = [line.split() for line in text.splitlines() if len(line.split()) > words] or [text.split()]
    chosen = [lines[len(lines) * (2 * i + 1) // (2 * count)] for i in range(count)]
    return list(dict.fromkeys(" ".join(line[:words]) for line in chosen))


def context_start(num_tokens: int, context: int) -> int:
    """Where the model's view begins when it predicts the token after `num_tokens`.

    All is seen until the context is full; then the view moves on by half a context at a time, so that what was computed
    for it can be reused until it moves again.
    """
    if num_tokens <= context:
        return 0
    hop = max(1, context // 2)
    return math.ceil((num_tokens - context) / hop) * hop


class _Reader:
    """Gives the logits after a growing list of tokens; with a cache, each token goes through the model once."""

    def __init__(self, model: GPT, context: int, use_cache: bool) -> None:
        self.model, self.context, self.use_cache = model, context, use_cache
        self.start = 0
        self.cache: list[LayerCache] | None = None

    def logits(self, ids: list[int]) -> Tensor:
        """(V,) for the token that follows ids."""
        start = context_start(len(ids), self.context)
        if not self.use_cache:
            self.cache = None
        elif self.cache is None or start != self.start:
            self.cache, self.start = self.model.new_cache(), start
        seen = self.cache[0].length if self.cache else 0
        new = torch.tensor([ids[start + seen :]], device=self.model.device)
        hidden = self.model.hidden(new, self.cache)
        logits: Tensor = self.model.lm_head(hidden[0, -1])
        return logits


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: list[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    context: int | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yields up to `max_new_tokens` token ids that follow a prompt; ends early at `<|endoftext|>`.

    context: how many tokens the model may look back on, its whole context if None. The same seed gives the same tokens.
    Raises UserError if the prompt is empty or has ids outside the vocabulary.
    """
    if not prompt or not all(0 <= i < model.config.vocab_size for i in prompt):
        raise UserError("a prompt needs at least one token, all of the model's vocabulary")
    generator = torch.Generator().manual_seed(seed)
    reader = _Reader(model, min(context or model.config.block_size, model.config.block_size), use_cache)
    ids = list(prompt)
    for _ in range(max_new_tokens):
        probs = probabilities(reader.logits(ids), sampling).cpu()
        token = int(torch.multinomial(probs, 1, generator=generator))
        if token == END_OF_TEXT:
            return
        ids.append(token)
        yield token
