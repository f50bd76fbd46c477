"""Encodes a corpus into token files. Killed at any moment, the next run goes on after the last finished shard.

Unfinished work is in a folder of its own: finished shards, and `progress.json`, which says where each ends in the
corpus. The folder belongs to one corpus and one split of it; other work there is deleted.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from gpt2 import tokenizer
from gpt2.config import TokenizeConfig
from gpt2.data.documents import Documents, read_documents
from gpt2.data.token_files import INDEX_FILE, SPLITS, TOKEN_TYPE, TokenArray, shard_name
from gpt2.data.tokenizing.blocks import BLOCK_BYTES, Block, Encoder, Job, count_blocks, encoder
from gpt2.data.tokenizing.splits import Duplicates, Split, split_documents
from gpt2.errors import FileError, UserError
from gpt2.files import atomic_path, atomic_write, file_lock, write_json
from gpt2.progress import ProgressCallback, no_progress

FORMAT = 2
"""Version of the token files, and of how their bytes follow from the corpus."""
SHARD_TOKENS = 100_000_000
BYTES_PER_TOKEN = 4
"""Of English text, about."""
PROGRESS_FILE = "progress.json"
LOCK_FILE = "lock"
BLOCKS_IN_ONE_PROCESS = 2


def count_processes(num_bytes: int, limit: int) -> int:
    """How many processes encode a corpus of that size, at most `limit`. A small one is done before others start."""
    blocks = count_blocks(num_bytes)
    return 1 if blocks <= BLOCKS_IN_ONE_PROCESS else min(limit, blocks)


def write_tokens(
    corpus: Path,
    documents: Path,
    folder: Path,
    config: TokenizeConfig,
    *,
    partial: Path,
    processes: int = 1,
    block_bytes: int = BLOCK_BYTES,
    shard_tokens: int = SHARD_TOKENS,
    progress: ProgressCallback = no_progress,
    resumed: ProgressCallback = no_progress,
) -> dict[str, Any]:
    """Writes the shards of both splits and, last, index.json (which it returns) into a folder.

    corpus, documents: the files of the fetch stage. partial: the folder for unfinished work; it is gone at the end.
    The number of processes changes no byte. shard_tokens: in each shard but the last of a split.
    progress: called with the bytes of text that were encoded since the last call, and with 0 in between.
    resumed: called once with the bytes of text that an earlier run encoded, if there are any.
    Raises UserError if a split has no document or fewer than two tokens, or if the corpus is not UTF-8; FileError if
    the disk is too small or the files do not belong together; BusyError if another process works in `partial`.
    """
    records = read_documents(documents, corpus)
    size = int(records["end"][-1])
    splits, duplicates = split_documents(corpus, records, config, progress=progress)
    job = Job(corpus, documents, splits, block_bytes)
    with file_lock(partial / LOCK_FILE):
        work = _Work(partial, _key(records, size, config, block_bytes, shard_tokens))
        done_bytes = work.done_bytes()
        check_disk(partial, sum(split.bytes for split in splits.values()) - done_bytes)
        if done_bytes:
            resumed(done_bytes)
        with encoder(job, processes) as encode:
            for name in splits:
                work.write_shards(name, encode, count_blocks(size, block_bytes), shard_tokens, progress)
        index = _index(work, splits, config, duplicates)
        check_lengths(index, size)
        work.publish(index, folder)
    return index


def check_lengths(index: dict[str, Any], size: int) -> None:
    """Raises UserError if a split has fewer than two tokens: one to continue, and its target."""
    for name, split in index["splits"].items():
        if split["tokens"] < 2:
            raise UserError(
                f"the {name} split has {split['bytes']} of the corpus's {size} bytes, which is too little; use a "
                "longer text or another tokenize.validation_fraction"
            )


def check_disk(folder: Path, num_bytes: int) -> None:
    """Raises FileError if the disk has too little space for the tokens of that many bytes of text."""
    needed = num_bytes // BYTES_PER_TOKEN * TOKEN_TYPE.itemsize
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FileError(
            f"the tokens need about {needed / 1e9:.1f} GB, and the disk of {folder} has {free / 1e9:.1f} GB left: free "
            "disk space, or set corpus.limit"
        )


def _key(records: Documents, size: int, config: TokenizeConfig, block_bytes: int, shard_tokens: int) -> str:
    """A hash of all that determines the shards. The hashes of the documents stand for the text."""
    facts = {**asdict(config), "format": FORMAT, "size": size, "block_bytes": block_bytes, "shard_tokens": shard_tokens}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(records).view(np.uint8).data)
    return digest.hexdigest()


class _Work:
    """The folder of unfinished work.

    The record of a shard has its `file`, `tokens` and `sha256`, and where the next shard goes on: after `skip` tokens
    of the block with the number `block`; the text of the blocks before has `bytes`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Keeps the work that is there if it has the same key."""
        self.folder, self._key = folder, key
        self._shards: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
            if content["key"] == key and all(map(self._is_whole, chain(*content["shards"].values()))):
                self._shards = content["shards"]
        kept = {PROGRESS_FILE, LOCK_FILE} | {shard["file"] for shard in chain(*self._shards.values())}
        for path in list(folder.iterdir()):
            if path.name not in kept:
                path.unlink()

    def _is_whole(self, shard: dict[str, Any]) -> bool:
        size = (self.folder / shard["file"]).stat().st_size
        return bool(size == shard["tokens"] * TOKEN_TYPE.itemsize)

    def shards(self, split: str) -> list[dict[str, Any]]:
        """The records of the finished shards of a split."""
        return self._shards[split]

    def done_bytes(self) -> int:
        """Bytes of the text that is in finished shards."""
        return sum(int(shards[-1]["bytes"]) for shards in self._shards.values() if shards)

    def write_shards(
        self, split: str, encode: Encoder, num_blocks: int, shard_tokens: int, progress: ProgressCallback
    ) -> None:
        """Writes the shards of a split that are not finished yet."""
        done = self._shards[split]
        number, skip, num_bytes = (done[-1][key] for key in ("block", "skip", "bytes")) if done else (0, 0, 0)
        with closing(encode.blocks(split, range(number, num_blocks), progress)) as blocks:
            stream = _Stream(blocks, number, skip, num_bytes, progress)
            while len(part := stream.take(shard_tokens)):
                file_name = shard_name(split, len(done))
                digest, num_tokens = hashlib.sha256(), 0
                with atomic_write(self.folder / file_name) as file:
                    while len(part):
                        file.write(part.data)
                        digest.update(part.data)
                        num_tokens += len(part)
                        left = shard_tokens - num_tokens
                        part = stream.take(left) if left else part[:0]
                shard = {"file": file_name, "tokens": num_tokens, "sha256": digest.hexdigest()}
                done.append({**shard, "block": stream.number, "skip": stream.skip, "bytes": stream.num_bytes})
                write_json(self.folder / PROGRESS_FILE, {"key": self._key, "shards": self._shards})

    def publish(self, index: dict[str, Any], folder: Path) -> None:
        """Moves the shards into the folder of the token files; index.json last. Deletes this folder."""
        folder.mkdir(parents=True, exist_ok=True)
        names = {shard["file"] for split in index["splits"].values() for shard in split["shards"]}
        (folder / INDEX_FILE).unlink(missing_ok=True)
        for old in set(folder.glob("*.bin")) - {folder / name for name in names}:
            old.unlink()
        for name in sorted(names):
            with atomic_path(folder / name) as temporary:
                try:  # the shard stays here, too, for a run that ends before it has moved all
                    os.link(self.folder / name, temporary)
                except OSError:  # another disk, or one without hard links
                    shutil.copyfile(self.folder / name, temporary)
        write_json(folder / INDEX_FILE, index)
        shutil.rmtree(self.folder)


class _Stream:
    """The tokens of blocks, and the place in them: `skip` tokens into block `number`, `num_bytes` of text before it."""

    def __init__(
        self, blocks: Iterator[Block], number: int, skip: int, num_bytes: int, progress: ProgressCallback
    ) -> None:
        self._blocks, self._block, self._progress = blocks, next(blocks, None), progress
        self.number, self.skip, self.num_bytes = number, skip, num_bytes

    def take(self, limit: int) -> TokenArray:
        """The next tokens, at most `limit`, which is not 0. None are left if it is empty."""
        while self._block is not None:
            part = self._block.tokens[self.skip : self.skip + limit]
            if len(part):
                self.skip += len(part)
                return part
            self._progress(self._block.bytes)
            self.number, self.skip, self.num_bytes = self.number + 1, 0, self.num_bytes + self._block.bytes
            self._block = next(self._blocks, None)
        return np.empty(0, dtype=TOKEN_TYPE)


def _index(work: _Work, splits: dict[str, Split], config: TokenizeConfig, duplicates: Duplicates) -> dict[str, Any]:
    """The content of index.json."""
    described = {}
    for name, split in splits.items():
        shards = [{key: shard[key] for key in ("file", "tokens", "sha256")} for shard in work.shards(name)]
        described[name] = {
            "tokens": sum(shard["tokens"] for shard in shards),
            "documents": split.documents,
            "bytes": split.bytes,
            "shards": shards,
        }
    return {
        "format": FORMAT,
        "tokenizer": "gpt2",
        "dtype": "uint16 little-endian",
        "end_of_text": tokenizer.END_OF_TEXT,
        "tokenize": asdict(config),
        "duplicates": asdict(duplicates),
        "splits": described,
    }
