"""From a corpus to token files, and from token files to batches.

A token file is a bare array of unsigned 16-bit little-endian integers, memory-mapped when read, so that neither the
corpus nor its tokens need to fit into memory. `meta.json` beside them says what they hold.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2 import tokenizer
from gpt2.config import TrainConfig
from gpt2.errors import FileError, UserError
from gpt2.files import atomic_write, sha256_of, write_json
from gpt2.progress import Progress, unseen

TOKEN_TYPE = np.dtype("<u2")
CHUNK_CHARACTERS = 1 << 20
MAX_PENDING_CHARACTERS = 1 << 24
Tokens = npt.NDArray[np.uint16]


def count_characters(corpus: Path) -> int:
    """Number of Unicode characters of a text file."""
    return sum(map(len, _text_chunks(corpus)))


def _text_chunks(corpus: Path) -> Iterator[str]:
    try:
        with corpus.open(encoding="utf-8", newline="") as file:
            while chunk := file.read(CHUNK_CHARACTERS):
                yield chunk
    except UnicodeDecodeError as error:
        raise UserError(f"{corpus} is not UTF-8: {error.reason}; make it again with the fetch stage") from None


def safe_cut(text: str) -> int:
    """Where a text can be cut so that its two parts, encoded alone, have the tokens of the whole; 0 if nowhere.

    GPT-2's pattern has white space at the start of a piece only, so a piece ends before each first white space.
    """
    end = len(text)
    while (cut := max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))) > 0:
        if not text[cut - 1].isspace():
            return cut
        end = cut
    return 0


def encode_chunks(chunks: Iterator[str]) -> Iterator[Tokens]:
    """Tokens of a text that comes in chunks: those of the whole text, in memory for a chunk.

    A run of 16 million characters without white space is cut where it is; its text stays what it was.
    """
    pending = ""
    for chunk in chunks:
        pending += chunk
        cut = safe_cut(pending)
        if not cut and len(pending) >= MAX_PENDING_CHARACTERS:
            cut = len(pending)
        if cut:
            yield np.array(tokenizer.encode(pending[:cut]), dtype=TOKEN_TYPE)
            pending = pending[cut:]
    if pending:
        yield np.array(tokenizer.encode(pending), dtype=TOKEN_TYPE)


def split_text(chunks: Iterator[str], start: int, end: int) -> Iterator[str]:
    """The characters from `start` to before `end` of a text that comes in chunks."""
    position = 0
    for chunk in chunks:
        part = chunk[max(0, start - position) : max(0, end - position)]
        if part:
            yield part
        position += len(chunk)
        if position >= end:
            return


def write_tokens(
    corpus: Path, folder: Path, validation_fraction: float, *, progress: Progress = unseen
) -> dict[str, Any]:
    """Writes train.bin, val.bin and, last, meta.json (which it returns) into a folder.

    The last `validation_fraction` of the corpus's characters are held out.
    Raises UserError if one of the two has no text.
    """
    num_characters = count_characters(corpus)
    boundary = math.floor(num_characters * (1 - validation_fraction))
    splits: dict[str, Any] = {}
    for name, start, end in ("train", 0, boundary), ("val", boundary, num_characters):
        text = split_text(_text_chunks(corpus), start, end)
        splits[name] = _write_split(folder / f"{name}.bin", text, progress)
        if splits[name]["tokens"] < 2:
            raise UserError(
                f"the {name} split has {end - start} of the corpus's {num_characters} characters, which is too little; "
                "use a longer text or another tokenize.validation_fraction"
            )
    meta = {
        "tokenizer": "gpt2",
        "dtype": "uint16 little-endian",
        "corpus_sha256": sha256_of(corpus),
        "corpus_characters": num_characters,
        "splits": splits,
    }
    write_json(folder / "meta.json", meta)
    return meta


def _write_split(path: Path, chunks: Iterator[str], progress: Progress) -> dict[str, int | str]:
    digest, num_tokens, num_bytes = hashlib.sha256(), 0, 0

    def counted() -> Iterator[str]:
        nonlocal num_bytes
        for chunk in chunks:
            size = len(chunk.encode())
            num_bytes += size
            yield chunk
            progress(size)

    with atomic_write(path) as file:
        for tokens in encode_chunks(counted()):
            data = tokens.tobytes()
            file.write(data)
            digest.update(data)
            num_tokens += len(tokens)
    return {"tokens": num_tokens, "bytes": num_bytes, "sha256": digest.hexdigest()}


def read_meta(folder: Path) -> dict[str, Any]:
    """What meta.json says. Raises FileError if it cannot be read, or does not describe both splits."""
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        for split in ("train", "val"):
            int(meta["splits"][split]["tokens"]), str(meta["splits"][split]["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{folder} has no readable meta.json ({error!r}); run the tokenize stage again") from None
    return meta


def open_tokens(folder: Path, split: str) -> Tokens:
    """The tokens of a split, "train" or "val", memory-mapped. Raises FileError if they are not those of meta.json."""
    expected = read_meta(folder)["splits"][split]
    path = folder / f"{split}.bin"
    try:
        found = sha256_of(path)
        tokens: Tokens = np.memmap(path, dtype=TOKEN_TYPE, mode="r")
    except (OSError, ValueError) as error:
        raise FileError(f"cannot read {path} ({error}); run the tokenize stage again") from None
    if len(tokens) != expected["tokens"]:
        raise FileError(f"{path} has {len(tokens)} tokens, not {expected['tokens']}; run the tokenize stage again")
    if found != expected["sha256"]:
        raise FileError(f"{path} is damaged: its SHA-256 is not that of meta.json; run the tokenize stage again")
    return tokens


class Sampler:
    """Batches of windows of the training tokens, as a pure function of (seed, step, micro-step).

    An epoch lays windows of `sequence_length` side by side, from an offset of its own, and visits each once in an order
    of its own. Both depend on the seed and the number of the epoch alone, so that a run can go on from any step, and
    ranks that share a run can each take their part of the one order.
    """

    def __init__(self, tokens: Tokens, config: TrainConfig) -> None:
        """Raises UserError if the tokens are fewer than one window and its targets."""
        self.sequence_length = config.sequence_length
        if len(tokens) < self.sequence_length + 1:
            raise UserError(
                f"the train split has {len(tokens)} tokens and a sequence needs {self.sequence_length + 1}; "
                "use a longer text or a smaller train.sequence_length"
            )
        self.tokens = tokens
        self.batch_size = config.batch_size
        self.accumulation_steps = config.accumulation_steps
        self.seed = config.seed
        self.num_windows = (len(tokens) - 1) // self.sequence_length
        self._epoch = -1
        self._starts: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def batch(self, step: int, micro_step: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets, each (batch_size, sequence_length)."""
        first = (step * self.accumulation_steps + micro_step) * self.batch_size
        starts = [self._start(i) for i in range(first, first + self.batch_size)]
        windows = np.stack([self.tokens[s : s + self.sequence_length + 1] for s in starts]).astype(np.int64)
        return windows[:, :-1], windows[:, 1:]

    def _start(self, index: int) -> int:
        """Where the window of this number in the run's order begins."""
        epoch, position = divmod(index, self.num_windows)
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            spare = len(self.tokens) - 1 - self.num_windows * self.sequence_length
            offset = generator.integers(spare + 1)
            self._starts = offset + self.sequence_length * generator.permutation(self.num_windows)
            self._epoch = epoch
        return int(self._starts[position])


def windows(
    tokens: Tokens, sequence_length: int, batch_size: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Each token of a split but the first as a target, once: inputs and targets, (up to batch_size, sequence_length).

    The last window may be shorter and comes alone.
    """
    num_targets = len(tokens) - 1
    span = sequence_length * batch_size
    full = num_targets - num_targets % sequence_length
    for start in range(0, full, span):
        end = min(start + span, full)
        part = tokens[start : end + 1].astype(np.int64)
        yield part[:-1].reshape(-1, sequence_length), part[1:].reshape(-1, sequence_length)
    if full < num_targets:
        rest = tokens[full:].astype(np.int64)
        yield rest[None, :-1], rest[None, 1:]
