"""Contamination: how much of the held-out text also stands in the training text."""

import numpy as np
import numpy.typing as npt

from gpt2.data.token_files import Tokens
from gpt2.progress import ProgressCallback, no_progress
from gpt2.tokenizer import END_OF_TEXT

NGRAM_TOKENS = 13
MAX_TOKENS = 1 << 20
CHUNK_TOKENS = 1 << 20
FILTER_BITS = 24
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
Hashes = npt.NDArray[np.uint64]


def contamination(held_out: Tokens, training: Tokens, *, progress: ProgressCallback = no_progress) -> float:
    """The share of held-out tokens that lie in an n-gram of 13 tokens that occurs in the training tokens.

    N-grams that overlap, as in section 4 of GPT-2's paper, of the length in appendix C of GPT-3's
    (https://arxiv.org/abs/2005.14165), in tokens instead of words. An n-gram does not cross the end of a document, and
    `<|endoftext|>` does not count as a token. Looks at the first million held-out tokens, and reads the training
    tokens in chunks: under 200 MB of memory for any size. Compares 64-bit hashes.
    progress: counts training tokens.
    """
    tokens = np.asarray(held_out[:MAX_TOKENS])
    grams = ngram_hashes(tokens)
    ends = np.concatenate([[0], np.cumsum(tokens == END_OF_TEXT)])
    starts = np.flatnonzero(ends[NGRAM_TOKENS:] == ends[:-NGRAM_TOKENS])
    wanted, which = np.unique(grams[starts], return_inverse=True)
    found = _occur_in(training, wanted, progress)[which]
    # +1 where a contaminated n-gram begins, -1 after its end
    steps = np.zeros(len(tokens) + 1, dtype=np.int64)
    np.add.at(steps, starts[found], 1)
    np.add.at(steps, starts[found] + NGRAM_TOKENS, -1)
    num_text_tokens = len(tokens) - ends[-1]
    return float((np.cumsum(steps) > 0).sum() / num_text_tokens) if num_text_tokens else 0.0


def _occur_in(training: Tokens, wanted: Hashes, progress: ProgressCallback) -> npt.NDArray[np.bool_]:
    """Which of the sorted hashes are those of an n-gram of the training tokens."""
    found = np.zeros(len(wanted), dtype=np.bool_)
    may_occur = np.zeros(1 << FILTER_BITS, dtype=np.bool_)  # by the first bits of the hash; spares most of the searches
    shift = np.uint64(64 - FILTER_BITS)
    may_occur[wanted >> shift] = True
    for first in range(0, len(training), CHUNK_TOKENS):
        chunk = training[first : first + CHUNK_TOKENS + NGRAM_TOKENS - 1]
        grams = ngram_hashes(np.asarray(chunk))
        grams = grams[may_occur[grams >> shift]]
        places = np.searchsorted(wanted, grams)
        found[places[wanted[np.minimum(places, len(wanted) - 1)] == grams]] = True
        progress(min(CHUNK_TOKENS, len(training) - first))
    return found


def ngram_hashes(tokens: npt.NDArray[np.uint16]) -> Hashes:
    """A 64-bit hash of each n-gram: (len(tokens) - 12,), empty for fewer tokens."""
    count = max(0, len(tokens) - NGRAM_TOKENS + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for i in range(NGRAM_TOKENS):
        hashes *= MULTIPLIER
        hashes += tokens[i : i + count]
        hashes ^= hashes >> np.uint64(29)
    return hashes
