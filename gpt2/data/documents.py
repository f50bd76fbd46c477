"""The documents of a corpus: where each ends in data/corpus.txt, and a hash of its text."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2.errors import FileError

DOCUMENT_TYPE = np.dtype([("end", "<u8"), ("hash", "<u8")])
"""A record of documents.bin. end: offset of the byte after the document in corpus.txt. hash: `hash_of` its text."""
Documents = npt.NDArray[Any]


def new_hash() -> "hashlib.blake2b":
    """What `hash_of` digests; `update` takes the UTF-8 bytes of the text."""
    return hashlib.blake2b(digest_size=8)


def hash_of(digest: "hashlib.blake2b") -> int:
    """The hash of a document, for splits and duplicates: 64 bits of BLAKE2b."""
    return int.from_bytes(digest.digest(), "little")


def read_documents(path: Path) -> Documents:
    """The records of documents.bin, memory-mapped. Raises FileError if it cannot be read, or has no document."""
    try:
        documents: Documents = np.memmap(path, dtype=DOCUMENT_TYPE, mode="r")
    except (OSError, ValueError) as error:
        raise FileError(f"cannot read {path} ({error}); run the fetch stage again") from None
    return documents
