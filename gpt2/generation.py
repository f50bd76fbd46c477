"""What is asked of a model, and how the next token is drawn from its logits."""

import codecs
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpt2.config import GPT2_VOCAB_SIZE
from gpt2.errors import UserError
from gpt2.tokenizer import END_OF_TEXT, token_bytes

BLANK_PROMPT = "\n"
"""What an empty prompt stands for: a model has to begin with something, and each text has line ends."""
LIKELIEST = (64, 1024)
"""How many of the likeliest tokens top-p looks at before it sorts all of them, which takes milliseconds."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    temperature: 0 takes the likeliest. top_k: only among the k likeliest. top_p: only among the fewest likeliest that
    have this probability together (Holtzman et al., https://arxiv.org/abs/1904.09751). repetition_penalty: 1 is none;
    what was already seen gets its logit divided by it, or multiplied where it is negative (Keskar et al.,
    https://arxiv.org/abs/1909.05858). They apply in this order: penalty, temperature, top_k, top_p.
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
    """A text to continue.

    prompt: token ids. The same seed writes the same text. It ends after max_new_tokens, at one of stop_tokens, or
    before one of the strings in `stop`. alternatives: how many of the likeliest tokens to tell with each chosen one.
    deadline_s: seconds from its arrival after which it ends, waiting included; None is no limit.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset({END_OF_TEXT})
    alternatives: int = 0
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        """Raises UserError for a value that makes no sense for any model."""
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
    """A token that was written.

    text: what it adds to the text; empty as long as a character or a stop string may not be complete. logprob: natural
    logarithm of the probability that the model gave it, before temperature and limits. alternatives: the likeliest
    tokens with theirs, most likely first. The token that ended a text is the last one, with what was still held back.
    """

    id: int
    text: str
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


def penalised(logits: Tensor, seen: Iterable[int], penalty: float) -> Tensor:
    """Logits, (V,), in which what was seen is less likely by the repetition penalty."""
    if penalty == 1:
        return logits
    ids = torch.tensor([i for i in set(seen) if i < logits.numel()], device=logits.device)
    chosen = logits[ids]
    return logits.index_copy(0, ids, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """What the next token is drawn from, by logits (V,): probabilities (K,) and their ids (K,), or None for 0 to V - 1.

    The ids beyond GPT-2's tokens, which a padded vocabulary may have, are never among them.
    """
    logits = logits[:GPT2_VOCAB_SIZE].float()
    if sampling.temperature == 0:
        return torch.ones(1, device=logits.device), logits.max(0).indices[None]
    ids = None
    if sampling.top_k is not None and sampling.top_k < logits.numel():
        logits, ids = logits.topk(sampling.top_k)  # before anything else looks at all of them
    logits = logits / sampling.temperature
    probs = logits.softmax(0)
    if sampling.top_p is None or sampling.top_p == 1:
        return probs, ids
    for count in (*LIKELIEST, probs.numel()):
        if count > probs.numel():
            continue
        likeliest, order = probs.topk(count) if ids is None else (probs, ids)  # top_k has sorted them
        before = likeliest.double().cumsum(0) - likeliest  # probability of all that are likelier
        if len(likeliest) == probs.numel() or before[-1] >= sampling.top_p:
            kept = int((before < sampling.top_p).sum())
            return likeliest[:kept] / likeliest[:kept].sum(), order[:kept]
    raise AssertionError("the last count is that of all")


def draw(logits: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """The next token by logits (V,).

    It is the first of as many exponentially distributed arrivals, each at its probability as the rate: a difference of
    rounding in the probabilities hardly ever changes which.
    """
    probs, ids = candidates(logits, sampling)
    first = 0
    if probs.numel() > 1:
        first = int((probs / torch.empty_like(probs).exponential_(generator=random)).argmax())
    return first if ids is None else int(ids[first])


class TextStream:
    """The text of tokens as they come, without what may still become another character or a stop string."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stop = stop
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token: int, *, last: bool = False) -> str:
        """What a token adds to the text; `last` gives all that is held back. Sets `stopped` at a stop string."""
        return self._released(self._decoder.decode(token_bytes(token), final=last), last)

    def rest(self) -> str:
        """All that is held back, if no more tokens come."""
        return self._released(self._decoder.decode(b"", final=True), True)

    def _released(self, new: str, last: bool) -> str:
        text, self._held = self._held + new, ""
        if found := [place for stop in self.stop if (place := text.find(stop)) >= 0]:
            self.stopped = True
            return text[: min(found)]
        if not last:
            longest = max((len(stop) - 1 for stop in self.stop), default=0)
            for length in range(min(longest, len(text)), 0, -1):
                if any(stop.startswith(text[-length:]) for stop in self.stop):
                    self._held = text[-length:]
                    return text[:-length]
        return text


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
