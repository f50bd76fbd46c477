"""Memorization: passages of generated text that are copied from the training text."""

import numpy as np
import numpy.typing as npt

from gpt2.data.token_files import Tokens
from gpt2.progress import ProgressCallback, no_progress
from gpt2.tokenizer import token_bytes

MIN_MATCH_BYTES = 8
CHUNK_TOKENS = 1 << 20


def longest_verbatim(samples: list[str], tokens: Tokens, *, progress: ProgressCallback = no_progress) -> str:
    """The longest passage of the samples that occurs verbatim in the text of `tokens`; "" if under 8 bytes.

    Finds every position that shares 8 bytes with a sample, and extends the match.
    """
    texts = [sample.encode() for sample in samples]
    places: dict[int, list[tuple[bytes, int]]] = {}
    for text in texts:
        for start, gram in enumerate(_grams(np.frombuffer(text, dtype=np.uint8)).tolist()):
            places.setdefault(gram, []).append((text, start))
    wanted = np.array(sorted(places), dtype=np.uint64)
    max_match_bytes = max([1, *map(len, texts)])
    best = b""
    tail = b""
    for first in range(0, len(tokens), CHUNK_TOKENS):
        chunk = tokens[first : first + CHUNK_TOKENS]
        training = tail + b"".join([token_bytes(int(token)) for token in chunk])
        tail = training[-max_match_bytes:]
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
        progress(len(chunk))
    return best.decode(errors="ignore") if len(best) >= MIN_MATCH_BYTES else ""


def _grams(text: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Every 8-gram of bytes as a number: (len(text) - 7,), empty for a shorter text."""
    count = max(0, len(text) - MIN_MATCH_BYTES + 1)
    grams = np.zeros(count, dtype=np.uint64)
    for i in range(MIN_MATCH_BYTES):
        grams = (grams << np.uint64(8)) | text[i : i + count].astype(np.uint64)
    return grams
