"""Requests to the engine, their sampling parameters, and the tokens that it returns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gpt2.errors import UserError
from gpt2.tokenizer import END_OF_TEXT

BLANK_PROMPT = "\n"
"""Replaces an empty prompt: the model needs at least one token, and every text has line breaks."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    temperature: 0 is greedy decoding. top_k: keep the k likeliest tokens. top_p: keep the smallest set of the likeliest
    tokens with this total probability (nucleus sampling, https://arxiv.org/abs/1904.09751). repetition_penalty: 1 is
    off; divides positive logits of earlier tokens and multiplies negative ones (https://arxiv.org/abs/1909.05858).
    Applied in this order: penalty, temperature, top_k, top_p.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}; expected a finite number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected more than 0 and at most 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; expected a finite number over 0")


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    prompt: token ids. seed: the same seed generates the same text. Generation ends after max_new_tokens, at one of
    stop_token_ids, or before one of the strings in `stop`. top_logprobs: number of the likeliest tokens to return with
    each generated one. timeout_s: seconds from arrival, including the time in the queue; None is no limit.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset({END_OF_TEXT})
    top_logprobs: int = 0
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range."""
        if not self.prompt:
            raise UserError("a prompt needs at least one token")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"the seed is {self.seed}; expected 0 to {2**63 - 1}")
        if "" in self.stop:
            raise UserError("a stop string is empty")


@dataclass(frozen=True)
class Token:
    """A generated token.

    text: what it adds to the text; empty while a character or a stop string may be incomplete. logprob: natural
    logarithm of its probability under the model, before temperature, top-k and top-p. top_logprobs: ids and log
    probabilities of the likeliest tokens, in descending order. The last token also carries the text held back so far.
    """

    id: int
    text: str
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()
