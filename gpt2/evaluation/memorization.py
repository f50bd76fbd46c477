"""Memorization: passages of generated text that are copied from the training text."""

from functools import cache

import numpy as np
import numpy.typing as npt

from gpt2.config import GPT2_VOCAB_SIZE
from gpt2.data.token_files import Tokens
from gpt2.progress import ProgressCallback, no_progress
from gpt2.tokenizer import token_bytes

MIN_MATCH_BYTES = 8
CHUNK_TOKENS = 1 << 17
"""Short, so that a long match is known early: only longer ones are looked at after it."""
FILTER_BITS = 16
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
Grams = npt.NDArray[np.uint64]


def longest_verbatim(samples: list[str], tokens: Tokens, *, progress: ProgressCallback = no_progress) -> str:
    """The longest passage of the samples that occurs verbatim in the text of `tokens`; "" if under 8 bytes.

    Finds every position that shares 8 bytes with a sample, and extends the match.
    """
    texts = [sample.encode() for sample in samples]
    places: dict[int, list[tuple[bytes, int]]] = {}
    for text in texts:
        for start, gram in enumerate(_grams(text).tolist()):
            places.setdefault(gram, []).append((text, start))
    wanted = np.array(sorted(places), dtype=np.uint64)
    may_occur = np.zeros(1 << FILTER_BITS, dtype=np.bool_)  # spares most of the searches
    may_occur[_filter_places(wanted)] = True
    text_of = _token_texts()
    max_match_bytes = max([1, *map(len, texts)])
    best = b""
    tail = b""
    for first in range(0, len(tokens), CHUNK_TOKENS):
        chunk = tokens[first : first + CHUNK_TOKENS]
        training = tail + b"".join([text_of[token] for token in chunk.tolist()])
        tail = training[-max_match_bytes:]
        grams = _grams(training)
        candidates = np.flatnonzero(may_occur[_filter_places(grams)])
        shared = candidates[np.isin(grams[candidates], wanted)]
        more = max(0, len(best) - MIN_MATCH_BYTES + 1)  # 8-grams in a row after the first, of a match that is longer
        starts = shared[: max(0, len(shared) - more)]
        for place in starts[shared[more:] - starts == more].tolist():
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
        progress(len(chunk))
    return best.decode(errors="ignore") if len(best) >= MIN_MATCH_BYTES else ""


@cache
def _token_texts() -> list[bytes]:
    """The bytes of each token of the vocabulary."""
    return [token_bytes(token) for token in range(GPT2_VOCAB_SIZE)]


def _grams(text: bytes) -> Grams:
    """Every 8-gram of bytes as a number: (len(text) - 7,), empty for a shorter text."""
    count = max(0, len(text) - MIN_MATCH_BYTES + 1)
    grams = np.empty(count, dtype=np.uint64)
    for i in range(min(MIN_MATCH_BYTES, count)):
        grams[i::MIN_MATCH_BYTES] = np.frombuffer(text, "<u8", -(-(count - i) // MIN_MATCH_BYTES), i)
    return grams


def _filter_places(grams: Grams) -> Grams:
    """The place of each 8-gram in a table of bits, by the first bits of its hash."""
    return (grams * MULTIPLIER) >> np.uint64(64 - FILTER_BITS)
