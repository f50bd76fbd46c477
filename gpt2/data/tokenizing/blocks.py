"""Blocks of a corpus, and their tokens: in this process or in several.

Where blocks begin depends only on the corpus, and their tokens are those of the whole text. So the result is the same
for any number of processes.
"""

import re
import signal
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from os import _exit
from pathlib import Path

import numpy as np

from gpt2 import tokenizer
from gpt2.data.documents import Documents, read_documents
from gpt2.data.token_files import TOKEN_TYPE, TokenArray
from gpt2.data.tokenizing.splits import Split
from gpt2.errors import OutOfMemoryError, UserError
from gpt2.progress import ProgressCallback

BLOCK_BYTES = 1 << 22
SEARCH_BYTES = 1 << 20
"""A block ends within so many bytes after a multiple of its size, if necessary inside a run without white space."""
NEAR_BYTES = 1 << 12
POLL_S = 0.1
RUN_START = re.compile(rb"(?<=[^ \n])[ \n]")
END_OF_TEXT = np.array([tokenizer.END_OF_TEXT], dtype=TOKEN_TYPE)


@dataclass(frozen=True)
class Job:
    """What to encode. corpus, documents: the files of the fetch stage. splits: by name."""

    corpus: Path
    documents: Path
    splits: Mapping[str, Split]
    block_bytes: int


@dataclass(frozen=True)
class Block:
    """The tokens of a split in a block. bytes: of their text."""

    tokens: TokenArray
    bytes: int


def count_blocks(num_bytes: int, block_bytes: int = BLOCK_BYTES) -> int:
    """Number of blocks of a corpus."""
    return max(1, -(-num_bytes // block_bytes))


def safe_cut(data: bytes, start: int) -> int | None:
    """The first index from `start`, which is not 0, at which a text can be cut: as `tokenizer.last_cut` finds the last.

    data: UTF-8 that may begin or end within a character.
    """
    for found in RUN_START.finditer(data, start):
        cut = found.start()
        if not data[max(0, cut - 4) : cut].decode(errors="ignore")[-1:].isspace():
            return cut
    return None


class BlockEncoder:
    """Encodes the blocks of a job in this process."""

    def __init__(self, job: Job) -> None:
        """Raises FileError if documents.bin cannot be read, and OSError."""
        self._job = job
        self._corpus = job.corpus.open("rb", buffering=0)
        self._size = job.corpus.stat().st_size
        self._documents: Documents = read_documents(job.documents)

    def encode(self, split: str, number: int) -> Block:
        """The tokens of a split in a block. Raises UserError if the corpus is not UTF-8."""
        parts = self._job.splits[split].parts(self._documents, self.start(number), self.start(number + 1))
        arrays = [np.empty(0, dtype=TOKEN_TYPE)]
        for start, stop, is_next in parts:
            if is_next:
                arrays.append(END_OF_TEXT)
            arrays.append(self._encode(start, stop))
        return Block(np.concatenate(arrays), sum(stop - start for start, stop, _ in parts))

    def start(self, number: int) -> int:
        """The byte at which a block begins: the first safe cut, or end of a document, from a multiple of its size on.

        Without one within SEARCH_BYTES, the multiple itself, or the next character.
        """
        position = number * self._job.block_bytes
        if position == 0 or position >= self._size:
            return min(position, self._size)
        document_end = int(self._documents["end"][bisect_left(self._documents["end"], position)])
        if document_end == position:
            return position
        stop = min(document_end, position + SEARCH_BYTES)
        before = min(position, 4)
        for end in (min(stop, position + NEAR_BYTES), stop):
            data = self._read(position - before, end)
            if (cut := safe_cut(data, before)) is not None:
                return position - before + cut
        if document_end <= position + SEARCH_BYTES:
            return document_end
        return position + next(i for i in range(4) if data[before + i] & 0xC0 != 0x80)

    def _encode(self, start: int, stop: int) -> TokenArray:
        try:
            text = self._read(start, stop).decode()
        except UnicodeDecodeError as error:
            corpus = self._job.corpus
            raise UserError(f"{corpus} is not UTF-8: {error.reason}; run the fetch stage again") from None
        return tokenizer.encode_array(text)

    def _read(self, start: int, stop: int) -> bytes:
        self._corpus.seek(start)
        parts = []
        while start < stop and (data := self._corpus.read(stop - start)):
            parts.append(data)
            start += len(data)
        return b"".join(parts)

    def close(self) -> None:
        """Closes the corpus."""
        self._corpus.close()


class Encoder:
    """Encodes the blocks of a job, in this process or in several."""

    def __init__(self, job: Job, pool: ProcessPoolExecutor | None, processes: int) -> None:
        """pool: of `processes` processes that `_start_worker` set up for the job; None is this process."""
        self._job, self._pool, self._processes = job, pool, processes

    def blocks(self, split: str, numbers: range, progress: ProgressCallback) -> Generator[Block]:
        """The blocks with these numbers, in order. progress: called with 0 while waiting.

        Raises UserError if the corpus is not UTF-8, and OutOfMemoryError if a process was killed.
        """
        if self._pool is None:
            encoder = BlockEncoder(self._job)
            try:
                for number in numbers:
                    yield encoder.encode(split, number)
            finally:
                encoder.close()
            return
        waiting: deque[Future[Block]] = deque()
        try:
            for number in numbers:
                with _without_interrupts():
                    waiting.append(self._pool.submit(_encode, split, number))
                if len(waiting) > 2 * self._processes:
                    yield _result(waiting.popleft(), progress)
            while waiting:
                yield _result(waiting.popleft(), progress)
        except BrokenProcessPool:
            raise OutOfMemoryError(
                "a process that encodes text was killed, perhaps because memory is short; run the same command again "
                "to go on after the last finished shard, with a smaller runtime.threads for fewer processes"
            ) from None


@contextmanager
def encoder(job: Job, processes: int) -> Iterator[Encoder]:
    """An encoder for the block. No process is left after it, also if this one is killed."""
    if processes == 1:
        yield Encoder(job, None, 1)
        return
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(job,))
    try:
        yield Encoder(job, pool, processes)
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: "Future[Block]", progress: ProgressCallback) -> Block:
    while True:
        progress(0)
        try:
            return future.result(POLL_S)
        except TimeoutError:
            if future.done():
                raise


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that start in the block never see a Ctrl-C, which their parent handles; it sees it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: BlockEncoder | None = None


def _start_worker(job: Job) -> None:
    """Sets up a process of the pool."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = BlockEncoder(job)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    _exit(1)


def _encode(split: str, number: int) -> Block:
    assert _worker is not None
    return _worker.encode(split, number)
