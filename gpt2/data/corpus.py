"""Sources of a corpus: a known corpus, Python's own documentation, a URL, a file or a folder.

Each source becomes one UTF-8 file with LF line ends and without a byte order mark, written in constant memory.
"""

import codecs
import hashlib
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2.data.download import DOWNLOADS, Download, download_file, is_url
from gpt2.data.python_docs import python_docs
from gpt2.errors import FileError, UserError
from gpt2.files import atomic_write
from gpt2.progress import ProgressCallback, no_progress

CHUNK_BYTES = 1 << 20
TEXT_SUFFIXES = (".txt", ".md")
PYTHON_DOCS = "python-docs"
KNOWN = (*DOWNLOADS, PYTHON_DOCS)


@dataclass(frozen=True)
class CorpusInfo:
    """The resolved source, and the size of the corpus file."""

    source: str
    licence: str
    sha256: str
    bytes: int
    characters: int
    lines: int


def write_corpus(
    source: str, target: Path, *, downloads: Path, roots: Iterable[Path], progress: ProgressCallback = no_progress
) -> CorpusInfo:
    """Writes the text of a source to `target`.

    downloads: the folder for downloaded files; a known corpus that was placed there by hand as `<name>.txt` is used.
    roots: folders that a relative path may start from; the first match wins.
    progress: called with the number of bytes downloaded since the last call, and with 0 during other work. An exception
    from it stops the work.
    Raises DownloadError; UserError if the source does not exist, or if its text is empty or not UTF-8.
    """
    if source == PYTHON_DOCS:
        licence = "Python Software Foundation License"
        name = f"{PYTHON_DOCS} (CPython {platform.python_version()})"
        chunks: Iterator[str] = python_docs(progress)
    elif source in DOWNLOADS or is_url(source):
        download = DOWNLOADS.get(source) or Download(url=source, sha256=None, licence="unknown")
        licence, name = download.licence, download.url
        file_name = source if source in DOWNLOADS else hashlib.sha256(source.encode()).hexdigest()[:16]
        chunks = read_text([download_file(download, downloads / f"{file_name}.txt", progress)])
    else:
        licence = "unknown"
        path = find_path(source, roots)
        name = str(path)
        chunks = read_text(text_files(path))
    return _write(chunks, target, name, licence, progress)


def _write(chunks: Iterator[str], target: Path, source: str, licence: str, progress: ProgressCallback) -> CorpusInfo:
    digest = hashlib.sha256()
    num_bytes = num_characters = num_lines = 0
    is_blank = True
    with atomic_write(target) as file:
        for chunk in chunks:
            progress(0)
            data = chunk.encode()
            file.write(data)
            digest.update(data)
            num_bytes += len(data)
            num_characters += len(chunk)
            num_lines += chunk.count("\n")
            is_blank = is_blank and not chunk.strip()
        if is_blank:
            raise UserError(f"the corpus {source} has no text; choose another corpus.source")
    return CorpusInfo(
        source=source,
        licence=licence,
        sha256=digest.hexdigest(),
        bytes=num_bytes,
        characters=num_characters,
        lines=num_lines,
    )


def find_path(source: str, roots: Iterable[Path]) -> Path:
    """The absolute path of a source. Raises UserError if it does not exist."""
    try:
        relative = Path(source).expanduser()
    except RuntimeError as error:  # ~user with an unknown user
        raise UserError(f"corpus.source {source!r}: {error}") from None
    candidates = [Path(os.path.abspath(root / relative)) for root in roots]
    for path in candidates:
        if path.exists():
            return path
    raise UserError(
        f"corpus.source {source!r} is not a known corpus ({', '.join(KNOWN)}) or an http(s) URL, and there is no "
        f"file or folder at {candidates[0]}"
    )


def text_files(path: Path) -> list[Path]:
    """The files of a source: itself, or a folder's .txt and .md files at any depth, in the order of their paths.

    Does not follow links to folders, which may form a cycle. Skips hidden files and folders.
    Raises UserError if a folder has no such file, or if the source is neither a file nor a folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} is neither a file nor a folder")
    found: list[Path] = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [
            Path(folder, name) for name in names if name.lower().endswith(TEXT_SUFFIXES) and not name.startswith(".")
        ]
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise UserError(f"the folder {path} has no {' or '.join(TEXT_SUFFIXES)} file")
    return files


def read_text(files: list[Path]) -> Iterator[str]:
    """The concatenated text of files, in chunks. Each file starts on a new line.

    CRLF and lone CR become LF; a byte order mark at a file's start is dropped.
    Raises UserError with the byte offset if a file is not UTF-8, FileError if it cannot be read.
    """
    last = "\n"
    for path in files:
        if last != "\n":
            yield "\n"
        for chunk in _read_file(path):
            yield chunk
            last = chunk[-1]


def _read_file(path: Path) -> Iterator[str]:
    # 'utf-8-sig' drops the byte order mark; a CR at the end of a chunk is held back until the next chunk
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="strict")
    offset = 0
    ends_with_cr = False
    try:
        with path.open("rb") as file:
            before = _version(os.fstat(file.fileno()))
            while True:
                data = file.read(CHUNK_BYTES)
                if offset == 0 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise UserError(f"{path} is UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8")
                pending = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset "
                        f"{offset - pending + error.start}; convert it, for example with "
                        "iconv -f ISO-8859-1 -t UTF-8"
                    ) from None
                offset += len(data)
                if ends_with_cr:
                    text = "\r" + text
                ends_with_cr = bool(data) and text.endswith("\r")
                if ends_with_cr:
                    text = text[:-1]
                if text := text.replace("\r\n", "\n").replace("\r", "\n"):
                    yield text
                if not data:
                    break
            if _version(path.stat()) != before:
                raise UserError(f"{path} changed while it was read; run again when nothing writes to it")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None


def _version(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
