"""What `preset auto` finds out about a text: its size, how much of it repeats, and what single tokens say about it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpt2.config import GPT2_VOCAB_SIZE, CorpusConfig, TokenizeConfig
from gpt2.data.corpus import write_corpus
from gpt2.data.limit import parse_limit
from gpt2.data.sources.download import DownloadError
from gpt2.data.token_files import Tokens, open_tokens
from gpt2.data.tokenizing.shards import count_processes, write_tokens
from gpt2.evaluation.contamination import ngram_hashes
from stages import paths

READ_BYTES = 50_000_000
"""So much of a text is looked at, and trained on, if the params do not limit it."""
STATISTICS_TOKENS = 4_000_000
COUNTED_TOKENS = 300_000
"""Training tokens, spread evenly over the text, from which `counting_loss` is computed; it falls with their number."""
WINDOW = 128
DISCOUNT = 0.75
MIN_TOKENS = 1_000
"""Fewer tokens than MIN_TOKENS are no text to train on."""
MIN_LINE_CHARACTERS = 20
"""Shorter lines repeat in every text: blank ones, names of speakers."""


@dataclass(frozen=True)
class Text:
    """A text. documents, bytes, tokens: of what is read of it. is_cut: whether there may be more of it.

    distinct: number of different tokens. repeated: share of the runs of 13 tokens that occurred before. repeated_lines:
    the same of lines. counting_loss: of the last tenth, as `counting_loss` says.
    """

    bytes: int
    documents: int
    tokens: int
    distinct: int
    repeated: float
    repeated_lines: float
    counting_loss: float
    is_cut: bool

    @property
    def new_tokens(self) -> int:
        """Tokens without repetitions."""
        return max(1, round(self.tokens * (1 - self.repeated)))


def look_at(config: CorpusConfig, split: TokenizeConfig, folder: Path, cores: int) -> Text:
    """Reads and tokenizes a text as the stages do, into data/ of a folder.

    Raises DownloadError; UserError if the source is not there, or is no text.
    """
    data, root = folder / paths.CORPUS.parent, paths.real_root()
    limit = parse_limit(config.limit or f"{READ_BYTES} bytes")

    def write(source: str | Sequence[str]) -> tuple[int, int]:
        found = write_corpus(
            source,
            folder / paths.CORPUS,
            folder / paths.DOCUMENTS,
            downloads=root / "data/downloads",
            roots=[Path.cwd(), root],
            text_column=config.text_column,
            limit=limit,
        )
        return found.bytes, found.documents

    data.mkdir(parents=True, exist_ok=True)
    try:
        num_bytes, documents = write(config.source)
    except DownloadError:
        if config.fallback is None:
            raise
        num_bytes, documents = write(config.fallback)
    write_tokens(
        folder / paths.CORPUS,
        folder / paths.DOCUMENTS,
        folder / paths.TOKENS,
        replace(split, validation_fraction=0.1),
        partial=data / "tokens.partial",
        processes=count_processes(num_bytes, cores),
    )
    train, val = (open_tokens(folder / paths.TOKENS, name) for name in ("train", "val"))
    sample, held_out = np.asarray(train[:STATISTICS_TOKENS]), np.asarray(val[:STATISTICS_TOKENS])
    return Text(
        bytes=num_bytes,
        documents=documents,
        tokens=len(train) + len(val),
        distinct=len(np.unique(sample)),
        repeated=repeated_share(sample),
        repeated_lines=repeated_lines(folder / paths.CORPUS),
        counting_loss=counting_loss(spread(train, COUNTED_TOKENS), held_out),
        is_cut=config.limit is None and num_bytes >= READ_BYTES - 4,  # cut at a character
    )


def repeated_share(tokens: npt.NDArray[np.uint16]) -> float:
    """The share of the runs of 13 tokens that occurred before."""
    grams = ngram_hashes(tokens)
    return 1 - len(np.unique(grams)) / len(grams) if len(grams) else 0.0


def repeated_lines(path: Path) -> float:
    """The share of the lines of some length that occurred before."""
    seen: set[int] = set()
    count = 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            if len(line) >= MIN_LINE_CHARACTERS:
                count += 1
                seen.add(hash(line))
    return 1 - len(seen) / count if count else 0.0


def spread(tokens: Tokens, count: int) -> npt.NDArray[np.uint16]:
    """About so many of the tokens, in windows spread evenly over the text; all of them if there are no more."""
    windows = -(-count // WINDOW)
    if len(tokens) <= windows * WINDOW:
        return np.asarray(tokens[:])
    starts = np.linspace(0, len(tokens) - WINDOW, windows, dtype=np.int64)
    return np.concatenate([tokens[start : start + WINDOW] for start in starts])


def counting_loss(training: npt.NDArray[np.uint16], held_out: npt.NDArray[np.uint16]) -> float:
    """How hard held-out tokens are to predict by counting the training tokens, in nats per token.

    The mean of two cross-entropies: by the frequency of a token, each counted 1/2 more often, and by the token before
    it, with absolute discounting (Ney, Essen and Kneser, 1994), which falls back on the frequency.
    """
    counts = np.bincount(training, minlength=GPT2_VOCAB_SIZE) + 0.5
    single = (counts / counts.sum())[held_out[1:]]
    pairs, pair_counts = np.unique(_pairs(training), return_counts=True)
    contexts, first = np.unique(pairs // GPT2_VOCAB_SIZE, return_index=True)
    totals, followers = np.add.reduceat(pair_counts, first), np.diff(first, append=len(pairs))
    held_out_pairs = _pairs(held_out)
    seen = _of(pairs, pair_counts, held_out_pairs)
    total = _of(contexts, totals, held_out_pairs // GPT2_VOCAB_SIZE)
    kept = DISCOUNT * _of(contexts, followers, held_out_pairs // GPT2_VOCAB_SIZE)
    after = np.where(total > 0, (np.maximum(seen - DISCOUNT, 0) + kept * single) / np.maximum(total, 1), single)
    return float(-(np.log(single).mean() + np.log(after).mean()) / 2)


def _pairs(tokens: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    """A number for each token and the one after it."""
    return tokens[:-1].astype(np.int64) * GPT2_VOCAB_SIZE + tokens[1:]


def _of(
    keys: npt.NDArray[np.int64], values: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The values of wanted keys; 0 for a key that is not among the sorted ones."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found: npt.NDArray[np.int64] = np.where(keys[places] == wanted, values[places], 0)
    return found
