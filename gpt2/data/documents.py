"""The documents of a corpus: where each ends in data/corpus.txt, and a hash of its text."""

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2.errors import FileError

DOCUMENT_TYPE = np.dtype([("end", "<u8"), ("hash", "<u8")])
"""A record of documents.bin. end: offset of the byte after the document in corpus.txt. hash: `hash_of` its text."""
RECORD = struct.Struct("<QQ")
Documents = npt.NDArray[Any]


def new_hash() -> "hashlib.blake2b":
    """What `hash_of` digests; `update` takes the UTF-8 bytes of the text."""
    return hashlib.blake2b(digest_size=8)


def hash_of(digest: "hashlib.blake2b") -> int:
    """The hash of a document, for splits and duplicates: 64 bits of BLAKE2b."""
    return int.from_bytes(digest.digest(), "little")


def record(end: int, digest: "hashlib.blake2b") -> bytes:
    """The record of a document. end: offset of the byte after it in corpus.txt. digest: of its text."""
    return RECORD.pack(end, hash_of(digest))


def read_documents(path: Path, corpus: Path | None = None) -> Documents:
    """The records of documents.bin, memory-mapped.

    corpus: its corpus.txt, whose size must be the last `end`; None does not compare them.
    Raises FileError if it cannot be read, has no document, or is not of this corpus.
    """
    try:
        documents: Documents = np.memmap(path, dtype=DOCUMENT_TYPE, mode="r")
        size = documents["end"][-1] if corpus is None else corpus.stat().st_size
    except (OSError, ValueError) as error:
        raise FileError(f"cannot read {path} ({error}); run the fetch stage again") from None
    if documents["end"][-1] != size:
        raise FileError(f"{path} is not of {corpus}, which has {size:,} bytes; run the fetch stage again")
    return documents
