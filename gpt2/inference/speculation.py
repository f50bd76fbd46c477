"""Prompt-lookup speculation: drafts of the next tokens, from the text so far.

If the last tokens have occurred before, those that followed them are a draft. The model verifies all its tokens in one
pass over the weights, which takes little longer than one token. The generated text is exactly that without drafts: each
token is sampled from its own logits with its own random numbers, and a draft is only used as far as it agrees
(Saxena, Prompt Lookup Decoding, 2023; the verification is that of https://arxiv.org/abs/2211.17192 for drafts without
probabilities).
"""

import time
from collections.abc import Callable, Sequence

MAX_DRAFT = 7
NGRAMS = (4, 3, 2)
"""Lengths of the matching end of the text, the longest first."""
PRIOR_TRIALS, PRIOR_RATE = 8.0, 0.4
MEMORY = 0.97
"""What the past counts for at each new token, so that the rate of acceptance follows the text."""
MIN_GAIN = 1.05
ROUNDS = 3


class Drafter:
    """Proposes drafts for one sequence, as long as they save time."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # n-gram: the index after its last occurrence
        self._indexed = 0
        self._trials, self._accepted = PRIOR_TRIALS, PRIOR_TRIALS * PRIOR_RATE

    def propose(self, ids: Sequence[int], limit: int, seconds: Sequence[float]) -> list[int]:
        """A draft of at most `limit` tokens to follow ids; empty if none promises to save time.

        seconds[n]: of a decode step with n + 1 tokens.
        """
        self._index(ids)
        found = next((at for n in NGRAMS if (at := self._after.get(tuple(ids[-n:]))) is not None), None)
        if found is None:
            return []
        draft = list(ids[found : found + min(limit, MAX_DRAFT)])
        return draft[: self._best_length(len(draft), seconds)]

    def record(self, proposed: int, accepted: int) -> None:
        """Takes note of how many tokens of a draft were right."""
        tried = min(accepted + 1, proposed)  # the tokens after the first wrong one were not tried
        self._trials = MEMORY * self._trials + tried
        self._accepted = MEMORY * self._accepted + accepted

    def _index(self, ids: Sequence[int]) -> None:
        # the n-gram at the end of the text is not indexed yet: it would find itself
        for end in range(max(self._indexed, min(NGRAMS)), len(ids)):
            for n in NGRAMS:
                if n <= end:
                    self._after[tuple(ids[end - n : end])] = end
        self._indexed = max(self._indexed, len(ids))

    def _best_length(self, limit: int, seconds: Sequence[float]) -> int:
        rate = self._accepted / self._trials
        best, best_gain, expected = 0, MIN_GAIN, 1.0
        for length in range(1, min(limit, len(seconds) - 1) + 1):
            expected += rate**length  # tokens from one step
            gain = expected * seconds[0] / seconds[length]
            if gain > best_gain:
                best, best_gain = length, gain
        return best


def measure_steps(step: Callable[[int], object], limit: int) -> list[float]:
    """Seconds of step(n) for n = 1 to MAX_DRAFT + 1 tokens, or to `limit`: the best of some rounds."""
    best = [float("inf")] * min(MAX_DRAFT + 1, limit)
    for _ in range(ROUNDS):
        for index in range(len(best)):
            start_s = time.perf_counter()
            step(index + 1)
            best[index] = min(best[index], time.perf_counter() - start_s)
    return best
