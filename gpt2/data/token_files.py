"""Token files: how the tokens of a split lie on the disk, and how they are read.

A split is a sequence of shards, `train-00000.bin` and so on: bare arrays of unsigned 16-bit little-endian integers.
`index.json` beside them names them, with their sizes and SHA-256 sums.
"""

import hashlib
import json
import os
import sys
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpt2.config import GPT2_VOCAB_SIZE
from gpt2.errors import FileError
from gpt2.files import sha256_of
from gpt2.progress import ProgressCallback, no_progress

TOKEN_TYPE = np.dtype("<u2")
INDEX_FILE = "index.json"
SPLITS = ("train", "val")
VERIFIED_AT_ONCE_BYTES = 64_000_000
"""Splits up to this size are verified when they are opened, larger ones by a thread."""
CHUNK_TOKENS = 1 << 20
AGAIN = "run the tokenize stage again"
TokenArray = npt.NDArray[np.uint16]


class Tokens(Protocol):
    """A sequence of tokens whose slices are arrays: `TokenFiles`, or an array."""

    def __len__(self) -> int:
        """Number of tokens."""

    def __getitem__(self, part: slice, /) -> TokenArray:
        """The tokens of a slice."""


def shard_name(split: str, number: int) -> str:
    """The file name of a shard, whose number counts from 0 in each split."""
    return f"{split}-{number:05d}.bin"


def read_index(folder: Path) -> dict[str, Any]:
    """The content of index.json. Raises FileError if it cannot be read, or does not describe both splits."""
    try:
        index: dict[str, Any] = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        for split in SPLITS:
            shards = index["splits"][split]["shards"]
            if sum(int(shard["tokens"]) for shard in shards) != index["splits"][split]["tokens"]:
                raise ValueError("numbers of tokens differ")
            for number, shard in enumerate(shards):
                if shard["file"] != shard_name(split, number) or not isinstance(shard["sha256"], str):
                    raise ValueError(f"shard {number} has the name {shard['file']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{folder} has no readable {INDEX_FILE} ({error!r}); {AGAIN}") from None
    return index


def split_sha256(index: Mapping[str, Any], split: str) -> str:
    """One sum for a split: the SHA-256 of the sums of its shards."""
    sums = "".join(shard["sha256"] for shard in index["splits"][split]["shards"])
    return hashlib.sha256(sums.encode()).hexdigest()


class TokenFiles:
    """The tokens of a split on the disk. Slices may cross the borders of shards; nothing stays in memory."""

    def __init__(self, paths: Sequence[Path], lengths: Sequence[int], sums: Sequence[str]) -> None:
        """lengths: tokens of each shard. sums: their SHA-256. Raises FileError if a file has another size."""
        self._paths, self._sums = paths, sums
        self._starts = [0, *accumulate(lengths)]
        self._damage: FileError | None = None
        self._thread: threading.Thread | None = None
        for path, length in zip(paths, lengths, strict=True):
            try:
                found, odd = divmod(path.stat().st_size, TOKEN_TYPE.itemsize)
            except OSError as error:
                raise FileError(f"cannot read {path} ({error}); {AGAIN}") from None
            if found != length or odd:
                raise FileError(f"{path} has {found} tokens, not {length}; {AGAIN}")

    def __len__(self) -> int:
        """Number of tokens of all shards."""
        return self._starts[-1]

    def __getitem__(self, part: slice, /) -> TokenArray:
        """The tokens of a slice with step 1, as a new array.

        Raises FileError if a shard cannot be read, or was found damaged since the last call.
        """
        if self._damage is not None:
            raise self._damage
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError("a slice of tokens has the step 1")
        tokens = np.empty(max(0, stop - start), dtype=TOKEN_TYPE)
        position = start
        while position < stop:
            shard = bisect_right(self._starts, position) - 1
            end = min(stop, self._starts[shard + 1])
            self._read(shard, position - self._starts[shard], tokens[position - start : end - start])
            position = end
        return tokens

    def _read(self, shard: int, offset: int, tokens: TokenArray) -> None:
        """Fills an array with the tokens of a shard from an offset on."""
        path = self._paths[shard]
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset * TOKEN_TYPE.itemsize)
                wanted = tokens.data.cast("B")
                while wanted and (count := file.readinto(wanted)):
                    wanted = wanted[count:]
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror}") from None
        if wanted:
            raise FileError(f"{path} became shorter while it was read; {AGAIN}")

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Reads every parts-th shard. Raises FileError if one does not have its sum."""
        for path, expected in list(zip(self._paths, self._sums, strict=True))[part::parts]:
            try:
                found = sha256_of(path)
            except OSError as error:
                raise FileError(f"cannot read {path} ({error}); {AGAIN}") from None
            if found != expected:
                raise FileError(f"{path} is damaged: its SHA-256 is not that of {INDEX_FILE}; {AGAIN}")

    def verify_in_background(self, part: int = 0, parts: int = 1) -> None:
        """Verifies in a thread, which only takes time that nothing else wants. The next slice raises its error."""

        def run() -> None:
            if sys.platform == "linux":  # where a thread has a priority of its own
                with suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            try:
                self.verify(part, parts)
            except FileError as error:
                self._damage = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def finish_verification(self) -> None:
        """Waits for the thread, if there is one. Raises FileError if it found a damaged shard."""
        if self._thread is not None:
            self._thread.join()
        if self._damage is not None:
            raise self._damage


def open_tokens(folder: Path, split: str, *, part: int = 0, parts: int = 1) -> TokenFiles:
    """The tokens of a split, "train" or "val".

    Sizes are checked at once. Sums are verified at once in a small split. In a large one, a thread verifies them while
    the tokens are used, and a later read raises its error. part, parts: this process and the number of processes that
    read the same files; each then verifies its part of a large split. Raises FileError if a file is not that of
    index.json.
    """
    shards = read_index(folder)["splits"][split]["shards"]
    tokens = TokenFiles(
        [folder / shard["file"] for shard in shards],
        [shard["tokens"] for shard in shards],
        [shard["sha256"] for shard in shards],
    )
    if len(tokens) * TOKEN_TYPE.itemsize <= VERIFIED_AT_ONCE_BYTES:
        tokens.verify()
    else:
        tokens.verify_in_background(part, parts)
    return tokens


def count_tokens(tokens: Tokens, *, progress: ProgressCallback = no_progress) -> npt.NDArray[np.int64]:
    """How often each token of the vocabulary occurs: (V,). Reads the tokens in chunks."""
    counts = np.zeros(GPT2_VOCAB_SIZE, dtype=np.int64)
    for first in range(0, len(tokens), CHUNK_TOKENS):
        chunk = tokens[first : first + CHUNK_TOKENS]
        counts += np.bincount(chunk, minlength=GPT2_VOCAB_SIZE)
        progress(len(chunk))
    return counts
