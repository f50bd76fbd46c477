"""The split of a corpus into training and validation: which documents, or parts of one, are on which side."""

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpt2.config import TokenizeConfig
from gpt2.data.documents import Documents
from gpt2.errors import UserError
from gpt2.progress import ProgressCallback, no_progress

CHUNK_BYTES = 1 << 20
CHUNK_DOCUMENTS = 1 << 20
HASHES = 2**64
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """One side.

    start, stop: the bytes of the corpus that it may take. lowest, highest: the hashes that its documents may have, both
    included. removed: sorted indices of duplicates, which it does not take. first: index of its first document.
    documents: how many it takes, or parts of one. bytes: of their text.
    """

    start: int
    stop: int
    lowest: int
    highest: int
    removed: Integers
    first: int = 0
    documents: int = 0
    bytes: int = 0

    def parts(self, documents: Documents, start: int, stop: int) -> list[tuple[int, int, bool]]:
        """What it takes of the bytes [start, stop) of the corpus.

        Start and end of each part, and whether `<|endoftext|>` stands before it: a document begins, and it is not the
        first one.
        """
        start, stop = max(start, self.start), min(stop, self.stop)
        if start >= stop:
            return []
        first, last = bisect_right(documents["end"], start), bisect_left(documents["end"], stop) + 1
        begins, ends, taken = self._select(documents, first, last)
        return [
            (int(max(start, begins[i])), int(min(stop, ends[i])), bool(begins[i] >= start and first + i != self.first))
            for i in np.flatnonzero(taken)
        ]

    def counted(self, documents: Documents) -> "Split":
        """With the number of its documents, the index of the first one, and the bytes of their text."""
        first, num_documents, num_bytes = None, 0, 0
        for start in range(0, len(documents), CHUNK_DOCUMENTS):
            begins, ends, taken = self._select(documents, start, start + CHUNK_DOCUMENTS)
            if first is None and taken.any():
                first = start + int(taken.argmax())
            num_documents += int(taken.sum())
            lengths = np.minimum(ends, self.stop) - np.maximum(begins, self.start)
            num_bytes += int(lengths[taken].sum())
        return replace(self, first=first or 0, documents=num_documents, bytes=num_bytes)

    def _select(self, documents: Documents, first: int, last: int) -> tuple[Integers, Integers, npt.NDArray[np.bool_]]:
        """Where the documents [first, last) begin and end, and which of them it takes, whole or in part."""
        begins, ends = extents(documents, first, last)
        hashes = documents["hash"][first:last]
        taken = (begins < ends) & (ends > self.start) & (begins < self.stop)
        taken &= (hashes >= np.uint64(self.lowest)) & (hashes <= np.uint64(self.highest))
        removed = self.removed[np.searchsorted(self.removed, first) : np.searchsorted(self.removed, last)]
        taken[removed - first] = False
        return begins, ends, taken


@dataclass(frozen=True)
class Duplicates:
    """Documents with the same text. across: in validation, of one in training. removed: left out of the tokens."""

    across: int
    removed: int


def extents(documents: Documents, first: int, last: int) -> tuple[Integers, Integers]:
    """Where the documents [first, last) begin and end in the corpus, in bytes."""
    ends = documents["end"][first:last].astype(np.int64)
    before = int(documents["end"][first - 1]) if first else 0
    return np.concatenate([[before], ends[:-1]]).astype(np.int64), ends


def split_documents(
    corpus: Path, documents: Documents, config: TokenizeConfig, *, progress: ProgressCallback = no_progress
) -> tuple[dict[str, Split], Duplicates]:
    """The splits "train" and "val", and the duplicates. progress: called with 0 now and then.

    tail: the last `validation_fraction` of the characters is for validation, perhaps from within a document.
    documents: those with a hash below this fraction of all hashes are, so that other documents never change the side of
    one. Raises UserError if a split gets no document.
    """
    size = int(documents["end"][-1])
    if config.split == "tail":
        border = tail_start(corpus, config.validation_fraction, progress)
        ranges = {"train": (0, border, 0, HASHES - 1), "val": (border, size, 0, HASHES - 1)}
        first_val = bisect_left(documents["end"], border) + 1 if border else 0
    else:
        threshold = int(config.validation_fraction * HASHES)
        ranges = {"train": (0, size, threshold, HASHES - 1), "val": (0, size, 0, threshold - 1)}
        first_val = len(documents)  # the same text has the same hash, and is on the same side
    removed, across = find_duplicates(documents, first_val, progress)
    if not config.deduplicate:
        removed = removed[:0]
    splits = {name: Split(*each, removed).counted(documents) for name, each in ranges.items()}
    for name, split in splits.items():
        if not split.documents:
            raise UserError(
                f"the {name} split has none of the corpus's {len(documents)} documents; use a longer text, another "
                "tokenize.validation_fraction, or tokenize.split: tail"
            )
    return splits, Duplicates(across=0 if config.deduplicate else across, removed=len(removed))


def tail_start(corpus: Path, fraction: float, progress: ProgressCallback = no_progress) -> int:
    """The offset, in bytes, at which the last `fraction` of a text's characters begins."""
    counts = []
    with corpus.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            counts.append(int(np.count_nonzero(_begins_character(data))))
            progress(0)
        left = math.floor(sum(counts) * (1 - fraction))
        for number, count in enumerate(counts):
            if left < count:
                file.seek(number * CHUNK_BYTES)
                return number * CHUNK_BYTES + int(np.flatnonzero(_begins_character(file.read(CHUNK_BYTES)))[left])
            left -= count
        return file.seek(0, 2)


def _begins_character(data: bytes) -> npt.NDArray[np.bool_]:
    """Which bytes begin a character in UTF-8: all but 0x80 to 0xBF, which are -128 to -65 as signed integers."""
    return np.frombuffer(data, dtype=np.int8) >= -64


def find_duplicates(
    documents: Documents, first_val: int, progress: ProgressCallback = no_progress
) -> tuple[Integers, int]:
    """The sorted indices of documents whose text came before, and how many from `first_val` on have it before there.

    Looks at one range of hashes after the other, so that millions of documents need little memory.
    """
    num_ranges = 1 + len(documents) // (4 * CHUNK_DOCUMENTS)
    later, across = [np.empty(0, dtype=np.int64)], 0
    for number in range(num_ranges):
        indices, hashes = _documents_in_range(documents, number, num_ranges)
        _, firsts = np.unique(hashes, return_index=True)
        later.append(np.delete(indices, firsts))
        is_val = indices >= first_val
        across += int(np.isin(hashes[is_val], hashes[~is_val]).sum())
        progress(0)
    return np.sort(np.concatenate(later)), across


def _documents_in_range(documents: Documents, number: int, num_ranges: int) -> tuple[Integers, npt.NDArray[np.uint64]]:
    """Indices and hashes of the documents with text whose hashes are in one of equal ranges."""
    indices, found = [], []
    for start in range(0, len(documents), CHUNK_DOCUMENTS):
        begins, ends = extents(documents, start, start + CHUNK_DOCUMENTS)
        hashes = documents["hash"][start : start + CHUNK_DOCUMENTS]
        of_range = (hashes >> np.uint64(32)) * np.uint64(num_ranges) >> np.uint64(32)
        chosen = np.flatnonzero((of_range == number) & (begins < ends))
        indices.append(start + chosen)
        found.append(hashes[chosen])
    return np.concatenate(indices), np.concatenate(found)
