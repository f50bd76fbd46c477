"""Tokenizes a corpus into token files, and reads them.

A token file is a bare array of unsigned 16-bit little-endian integers, memory-mapped when read, so that neither the
corpus nor its tokens need to fit into memory. `meta.json` beside them describes them.
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
from gpt2.errors import FileError, UserError
from gpt2.files import atomic_write, sha256_of, write_json
from gpt2.progress import ProgressCallback, no_progress

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
        raise UserError(f"{corpus} is not UTF-8: {error.reason}; run the fetch stage again") from None


def safe_cut(text: str) -> int:
    """The last index at which a text can be split without changing its tokens; 0 if there is none.

    In GPT-2's pattern white space only starts a piece, so a piece ends before each run of white space.
    """
    end = len(text)
    while (cut := max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))) > 0:
        if not text[cut - 1].isspace():
            return cut
        end = cut
    return 0


def encode_chunks(chunks: Iterator[str]) -> Iterator[Tokens]:
    """Tokens of a text given in chunks: the same as those of the whole text, with memory for one chunk.

    A run of 16 million characters without white space is split, which may change its tokens, but not its text.
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
    """Characters [start, end) of a text given in chunks."""
    position = 0
    for chunk in chunks:
        part = chunk[max(0, start - position) : max(0, end - position)]
        if part:
            yield part
        position += len(chunk)
        if position >= end:
            return


def write_tokens(
    corpus: Path, folder: Path, validation_fraction: float, *, progress: ProgressCallback = no_progress
) -> dict[str, Any]:
    """Writes train.bin, val.bin and, last, meta.json (which it returns) into a folder.

    The last `validation_fraction` of the corpus's characters are held out.
    Raises UserError if a split has fewer than two tokens.
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


def _write_split(path: Path, chunks: Iterator[str], progress: ProgressCallback) -> dict[str, int | str]:
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
    """The content of meta.json. Raises FileError if it cannot be read, or does not describe both splits."""
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        for split in ("train", "val"):
            int(meta["splits"][split]["tokens"]), str(meta["splits"][split]["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{folder} has no readable meta.json ({error!r}); run the tokenize stage again") from None
    return meta


def open_tokens(folder: Path, split: str) -> Tokens:
    """The tokens of a split, "train" or "val", memory-mapped. Raises FileError if they do not match meta.json."""
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
