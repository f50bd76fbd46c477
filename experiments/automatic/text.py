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
from gpt2.data.token_files import open_tokens
from gpt2.data.tokenizing.shards import count_processes, write_tokens
from gpt2.evaluation.contamination import ngram_hashes
from stages import paths

READ_BYTES = 50_000_000
"""So much of a text is looked at, and trained on, if the params do not limit it."""
STATISTICS_TOKENS = 4_000_000
MIN_TOKENS = 1_000
"""Fewer tokens are no text to train on."""
MIN_LINE_CHARACTERS = 20
"""Shorter lines repeat in every text: blank ones, names of speakers."""


@dataclass(frozen=True)
class Text:
    """A text. documents, bytes, tokens: of what is read of it. is_cut: whether there may be more of it.

    distinct: number of different tokens. repeated: share of the runs of 13 tokens that occurred before. repeated_lines:
    the same of lines. unigram_loss: of the last tenth, in nats per token, if each token is predicted by how often it
    occurs in the rest.
    """

    bytes: int
    documents: int
    tokens: int
    distinct: int
    repeated: float
    repeated_lines: float
    unigram_loss: float
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
        unigram_loss=unigram_loss(sample, held_out),
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


def unigram_loss(training: npt.NDArray[np.uint16], held_out: npt.NDArray[np.uint16]) -> float:
    """Cross-entropy in nats per token of held-out tokens, by their frequency in the training tokens, each plus 1/2."""
    counts = np.bincount(training, minlength=GPT2_VOCAB_SIZE) + 0.5
    return float(-np.log(counts / counts.sum())[held_out].mean())
