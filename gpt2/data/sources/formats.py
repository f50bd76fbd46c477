"""The formats of files, by their suffixes: text, JSON lines, CSV and Parquet, also compressed or in a zip archive."""

import bz2
import gzip
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from tempfile import TemporaryFile
from typing import IO, Any

from gpt2.data.sources.parquet import parquet_documents
from gpt2.data.sources.rows import csv_documents, jsonl_documents
from gpt2.data.sources.text import DAMAGED, Document, Readable, decode, read_chunks, read_error
from gpt2.errors import UserError

TEXT_SUFFIXES = (".txt", ".md")
ROW_SUFFIXES = (".jsonl", ".parquet", ".csv")
COMPRESSIONS = (".gz", ".zst", ".bz2")
ARCHIVES = (".tar", ".tgz", ".7z", ".rar", ".xz")
KNOWN_FORMATS = (
    f"{', '.join((*TEXT_SUFFIXES, *ROW_SUFFIXES))}, each also with {', '.join(COMPRESSIONS)}, and .zip of such files"
)
TEXT_PER_BYTE = {".jsonl": 0.7, ".csv": 0.7, ".gz": 2.5, ".zst": 2.5, ".bz2": 3.0, ".zip": 2.0}
"""Bytes of text that a file has at least, usually, for each of its own."""


@dataclass(frozen=True)
class SourceFile:
    """A file to read documents from.

    name: for messages. file_name: its suffixes are its format. size: in bytes, as stored; None if unknown.
    open: a new stream, seekable unless it is sequential. version: changes when the file does.
    is_packed: a member of an archive, which is not seekable.
    """

    name: str
    file_name: str
    size: int | None
    open: Callable[[], IO[bytes]]
    version: Callable[[], object] = lambda: None
    is_packed: bool = False


def suffixes_of(file_name: str) -> tuple[str, str]:
    """The suffix of the format and that of the compression, in lower case; each may be empty."""
    path = PurePosixPath(file_name.lower())
    if path.suffix in COMPRESSIONS:
        return PurePosixPath(path.stem).suffix, path.suffix
    return path.suffix, ""


def is_known(file_name: str) -> bool:
    """Whether a file in a folder or an archive is one to read: of a known format, and not hidden."""
    suffix, compression = suffixes_of(file_name)
    is_zip = suffix == ".zip" and not compression
    return (suffix in TEXT_SUFFIXES + ROW_SUFFIXES or is_zip) and not file_name.startswith(".")


def needs_seek(file_name: str) -> bool:
    """Whether a format is read from a seekable stream."""
    return suffixes_of(file_name) in ((".parquet", ""), (".zip", ""))


def text_bytes(file: SourceFile) -> int:
    """A cautious estimate of the bytes of text in a file; 0 if its size is unknown."""
    factor = 1.0
    for suffix in suffixes_of(file.file_name):
        factor *= TEXT_PER_BYTE.get(suffix, 1.0)
    return int(factor * (file.size or 0))


def documents_of(file: SourceFile, column: str) -> Iterator[Document]:
    """The documents of a file, each to be read before the next: a text is one, and each row of another format is.

    A file of another or no suffix is text. column: of the text, in rows.
    Raises UserError if the file is damaged, not UTF-8, changed while it was read, or has no such column; FileError if
    it cannot be read.
    """
    suffix, compression = suffixes_of(file.file_name)
    if suffix in ARCHIVES or (suffix == ".zip" and (compression or file.is_packed)):
        raise UserError(f"{file.name} is an archive of a kind that is not read; unpack it, and use the folder")
    version = _attempt(file.name, file.version)
    with _attempt(file.name, file.open) as stream:
        if suffix == ".zip":
            yield from _zip_documents(stream, file.name, column)
        elif suffix == ".parquet" and not compression and not file.is_packed:
            yield from parquet_documents(stream, file.name, column)
        else:
            is_packed = bool(compression) or file.is_packed
            plain = _attempt(file.name, partial(_decompressed, stream, compression))
            chunks = read_chunks(plain, file.name, file.size if is_packed else None)
            if suffix == ".parquet":
                with TemporaryFile() as copy:
                    copy.writelines(chunks)
                    yield from parquet_documents(copy, file.name, column)
            elif suffix == ".jsonl":
                yield from jsonl_documents(chunks, file.name, column)
            elif suffix == ".csv":
                yield from csv_documents(chunks, file.name, column)
            else:
                yield decode(chunks, file.name)
    if _attempt(file.name, file.version) != version:
        raise UserError(f"{file.name} changed while it was read; run again when nothing writes to it")


def _attempt(name: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except (OSError, *DAMAGED) as error:
        raise read_error(name, error) from None


def _decompressed(stream: IO[bytes], compression: str) -> Readable:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=stream)
    if compression == ".bz2":
        return bz2.BZ2File(stream)
    if compression == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(stream, "zstd")  # type: ignore[no-any-return]
    return stream


def _zip_documents(stream: IO[bytes], name: str, column: str) -> Iterator[Document]:
    """The documents of an archive's files, in the order of their paths. Nothing is extracted to these paths."""
    archive = _attempt(name, partial(zipfile.ZipFile, stream))
    members = [
        info
        for info in sorted(archive.infolist(), key=lambda info: info.filename)
        if is_known(PurePosixPath(info.filename).name) and not info.filename.startswith("__MACOSX/")
    ]
    if not members:
        raise UserError(f"{name} has no file of a known format: {KNOWN_FORMATS}")
    for info in members:
        place = f"{name}, {info.filename!r}"
        if info.flag_bits & 1:
            raise UserError(f"{place} is encrypted; unpack the archive, and use the folder")
        member = SourceFile(
            place, PurePosixPath(info.filename).name, info.compress_size, partial(archive.open, info), is_packed=True
        )
        yield from documents_of(member, column)
