"""Streams of bytes as text: UTF-8 without a byte order mark, with LF line ends, in constant memory."""

import codecs
import lzma
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Protocol

from gpt2.errors import FileError, GPT2Error, UserError, one_line

CHUNK_BYTES = 1 << 20
MAX_ROW_CHARACTERS = 1 << 28
MAX_EXPANSION, EXPANSION_FREE_BYTES = 200, 100_000_000
"""A compressed file may expand to this many times its size, beyond its first bytes."""
DAMAGED = (EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
"""What the libraries raise for files that are not what their names say, or are incomplete."""
Document = Iterable[str]
"""The text of a document, in chunks; empty for a row without text."""


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""


def read_error(name: str, error: Exception) -> GPT2Error:
    """The error to raise when a library cannot read a file: FileError if the system refused, otherwise UserError."""
    if isinstance(error, OSError) and error.errno is not None:
        return FileError(f"cannot read {name}: {error.strerror}")
    return UserError(f"{name} is damaged, incomplete or of another format ({one_line(error)}); replace it")


def check_expansion(name: str, size: int, compressed: int) -> None:
    """Raises UserError if a file expands as only one made to fill a disk does. Sizes are in bytes."""
    if size > max(EXPANSION_FREE_BYTES, MAX_EXPANSION * compressed):
        raise UserError(
            f"{name} expands to more than {MAX_EXPANSION} times its {compressed:,} bytes, like a zip bomb; unpack it "
            "yourself if it is meant"
        )


def read_chunks(stream: Readable, name: str, compressed: int | None = None) -> Iterator[bytes]:
    """The bytes of a stream in chunks.

    name: of the file, for messages. compressed: its size if the stream decompresses it, None if it does not or if
    that is not known. Raises UserError if it is damaged or expands too much, FileError if it cannot be read.
    """
    size = 0
    while True:
        try:
            data = stream.read(CHUNK_BYTES)
        except (OSError, *DAMAGED) as error:
            raise read_error(name, error) from None
        if not data:
            return
        size += len(data)
        if compressed is not None:
            check_expansion(name, size, compressed)
        yield data


def normalize(text: str) -> str:
    """A text with LF line ends."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def decode(chunks: Iterable[bytes], name: str) -> Iterator[str]:
    """The text of UTF-8 bytes given in chunks, in chunks.

    CRLF and lone CR become LF; a byte order mark at the start is dropped.
    Raises UserError with the byte offset if the bytes are not UTF-8.
    """
    # 'utf-8-sig' drops the byte order mark; a CR at the end of a chunk is held back until the next chunk
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="strict")
    offset = 0
    held = ""
    for data in chunks:
        if offset == 0 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"{name} is UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8")
        text = held + _decoded(decoder, data, offset, name)
        offset += len(data)
        held = "\r" if text.endswith("\r") else ""
        if text := normalize(text.removesuffix("\r")):
            yield text
    if text := normalize(held + _decoded(decoder, b"", offset, name)):
        yield text


def _decoded(decoder: codecs.IncrementalDecoder, data: bytes, offset: int, name: str) -> str:
    pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8: byte {error.object[error.start]:#04x} at offset {offset - pending + error.start}; "
            "convert it, for example with iconv -f ISO-8859-1 -t UTF-8"
        ) from None


def lines(chunks: Iterable[str], name: str) -> Iterator[str]:
    """The lines of a text given in chunks, without their LF.

    Raises UserError if one is longer than MAX_ROW_CHARACTERS.
    """
    pending: list[str] = []
    length, number = 0, 1
    for chunk in chunks:
        first, *others = chunk.split("\n")
        pending.append(first)
        length += len(first)
        check_row(length, name, number)
        if others:
            line = "".join(pending)
            pending = [others[-1]]  # a long line is not held twice
            length = len(others[-1])
            yield line
            yield from others[:-1]
            number += len(others)
    if last := "".join(pending):
        yield last


def check_row(length: int, name: str, line: int) -> None:
    """Raises UserError if a row, which starts on a line, has too many characters to hold it in memory."""
    if length > MAX_ROW_CHARACTERS:
        raise UserError(
            f"{name}, line {line}: the row is longer than {MAX_ROW_CHARACTERS:,} characters; split it into documents"
        )
