"""What a batch computes: a part of the prompts that are new, and the next token of every other sequence."""

import math

import torch
from torch import Tensor

from gpt2.errors import GPT2Error
from gpt2.inference.detokenizer import Detokenizer
from gpt2.inference.kv_cache import ModelRunner, window_start
from gpt2.inference.request import Request
from gpt2.inference.sampling import apply_repetition_penalty, sample_token
from gpt2.inference.speculation import Drafter

Sampled = GPT2Error | tuple[int, float, tuple[tuple[int, float], ...]]
"""A token, its log probability, and ids and log probabilities of the likeliest tokens; or why there is none."""


class RunningSequence:
    """A request in a slot of the KV cache, and its tokens so far. has_ended: it needs no further tokens."""

    def __init__(self, request: Request, slot: int) -> None:
        self.request, self.slot = request, slot
        self.ids = list(request.prompt)
        self.window_start = 0  # index in ids of the first token of the window
        self.num_cached = 0  # tokens of the window in the KV cache
        self.is_compiled: bool | None = None  # one path for the whole text; None before its first token
        self.num_generated = 0
        self.has_ended = False
        self.drafter = Drafter()
        self.generator = torch.Generator().manual_seed(request.seed)
        self.detokenizer = Detokenizer(request.stop)


class Batch:
    """The sequences that one model extends together."""

    def __init__(self, runner: ModelRunner, context_length: int, *, speculate: bool) -> None:
        self.runner, self.context_length, self.speculate = runner, context_length, speculate

    @torch.inference_mode()
    def step(self, running: list[RunningSequence]) -> dict[int, list[Sampled]]:
        """One step. Returns by slot the tokens that it adds to each sequence that has its prompt in the cache."""
        if self.runner.poll() and all(sequence.is_compiled is not False for sequence in running):
            self.runner.release()
        # with logits (len(draft) + 1, V), their logsumexp, and draft
        ready: list[tuple[RunningSequence, Tensor, Tensor, list[int]]] = []
        budget = 1.0 if len(running) > 1 else math.inf  # parts of prompts, for which the others wait
        decoding: list[RunningSequence] = []
        for sequence in running:
            while not (can_decode := self._can_decode(sequence)) and budget > 0:
                if sequence.has_ended:
                    break
                hidden, part = self._prefill_chunk(sequence, is_alone=len(running) == 1)
                budget -= part
                if hidden is not None:
                    row = self.runner.logits(hidden)[None].float().cpu()
                    ready.append((sequence, row, row.logsumexp(1), []))
                    break
            if can_decode:
                decoding.append(sequence)
        for is_compiled in (True, False):
            batch = [sequence for sequence in decoding if sequence.is_compiled == is_compiled]
            if batch and is_compiled:
                drafts = [self._draft(sequence) if len(running) == 1 else [] for sequence in batch]
                tokens = [[sequence.ids[-1], *draft] for sequence, draft in zip(batch, drafts, strict=True)]
                logits, totals = self.runner.decode_compiled([sequence.slot for sequence in batch], tokens)
                ready += zip(batch, logits, totals, drafts, strict=True)
            elif batch:
                rows = self.runner.decode([each.slot for each in batch], [each.ids[-1] for each in batch]).float().cpu()
                ready += [
                    (sequence, row[None], row.logsumexp(0)[None], []) for sequence, row in zip(batch, rows, strict=True)
                ]
        return {
            sequence.slot: self._sample(sequence, logits, totals, draft) for sequence, logits, totals, draft in ready
        }

    def _can_decode(self, sequence: RunningSequence) -> bool:
        start = window_start(len(sequence.ids), self.context_length)
        if start != sequence.window_start:
            sequence.window_start, sequence.num_cached = start, 0
        if sequence.is_compiled is None:
            sequence.is_compiled = self.runner.compiled is not None
        if not sequence.num_cached:
            self.runner.lengths[sequence.slot] = 0  # an earlier sequence may have left more
        is_last = sequence.num_cached == len(sequence.ids) - start - 1
        return is_last and (sequence.is_compiled or sequence.num_cached > 0)

    def _prefill_chunk(self, sequence: RunningSequence, *, is_alone: bool) -> tuple[Tensor | None, float]:
        """Processes the next tokens of the window, and returns what part of a chunk they are.

        The compiled kernels take the prompt of a sequence that is alone as a whole; with them, chunks change nothing.
        PyTorch's path also returns the hidden state after the last token. The compiled step will process that token.
        """
        runner, is_compiled = self.runner, bool(sequence.is_compiled)
        size = self.context_length if is_compiled and is_alone else runner.chunks[is_compiled]
        cached = sequence.num_cached
        first, last = sequence.window_start + cached, len(sequence.ids) - is_compiled
        chunk = sequence.ids[first : min(first + size, last)]
        sequence.num_cached += len(chunk)
        if is_compiled:
            runner.prefill_compiled(sequence.slot, chunk, cached=cached)
            return None, len(chunk) / size
        hidden = runner.prefill(sequence.slot, chunk, cached=cached)
        return hidden if first + len(chunk) == last else None, len(chunk) / size

    def _draft(self, sequence: RunningSequence) -> list[int]:
        room = self.context_length - sequence.num_cached - 1
        limit = min(room, sequence.request.max_new_tokens - sequence.num_generated - 1)
        if not self.speculate or limit < 1:
            return []
        return sequence.drafter.propose(sequence.ids, limit, self.runner.decode_seconds)

    def _sample(self, sequence: RunningSequence, logits: Tensor, totals: Tensor, draft: list[int]) -> list[Sampled]:
        """The next token, and those after it as long as the draft has them.

        logits: (len(draft) + 1, V). totals: their logsumexp.
        """
        sampled: list[Sampled] = []
        seen = sequence.ids[sequence.window_start :]
        for row, total, guess in zip(logits, totals.tolist(), [*draft, None], strict=True):
            result = _next_token(sequence, seen, row, total)
            sampled.append(result)
            if isinstance(result, GPT2Error) or result[0] != guess:
                break
            seen.append(guess)
        if draft:
            sequence.drafter.record(len(draft), len(sampled) - 1)
        if sequence.num_cached != self.runner.lengths[sequence.slot]:  # decoded
            sequence.num_cached += len(sampled)
            self.runner.lengths[sequence.slot] = sequence.num_cached
        return sampled


def _next_token(sequence: RunningSequence, seen: list[int], logits: Tensor, total: float) -> Sampled:
    """The next token after those in the window, its log probability and the likeliest tokens.

    logits: (V,). total: their logsumexp.
    """
    if not math.isfinite(total):
        return GPT2Error("the model returned non-finite logits; its weights are damaged")
    adjusted = apply_repetition_penalty(logits, seen, sequence.request.sampling.repetition_penalty)
    token = sample_token(adjusted, sequence.request.sampling, sequence.generator)
    top_logprobs: tuple[tuple[int, float], ...] = ()
    if count := min(sequence.request.top_logprobs, logits.numel()):
        values, ids = logits.topk(count)
        top_logprobs = tuple(zip(ids.tolist(), (values - total).tolist(), strict=True))
    return token, float(logits[token]) - total, top_logprobs
