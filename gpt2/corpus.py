"""Where the text comes from: a known corpus, Python's own documentation, a URL, a file or a folder.

Each source becomes one UTF-8 file with LF line ends and without a byte order mark, written in constant memory.
"""

import ast
import codecs
import hashlib
import http.client
import os
import platform
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gpt2.errors import FileError, UserError
from gpt2.files import atomic_write, sha256_of
from gpt2.progress import Progress, unseen

CHUNK_BYTES = 1 << 20
DOWNLOAD_TIMEOUT_S = 20
TEXT_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True)
class Download:
    """A corpus on the web. sha256: None for one that we do not know."""

    url: str
    sha256: str | None
    licence: str


DOWNLOADS = {
    "tinyshakespeare": Download(
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        licence="public domain",
    ),
}
PYTHON_DOCS = "python-docs"
KNOWN = (*DOWNLOADS, PYTHON_DOCS)
NOT_DOCUMENTATION = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3"}
MIN_PIECE_CHARACTERS = 80


class DownloadError(FileError):
    """A text could not be downloaded."""


@dataclass(frozen=True)
class CorpusFacts:
    """What was written: `source` as it was found, and the sizes of the corpus file."""

    source: str
    licence: str
    sha256: str
    bytes: int
    characters: int
    lines: int


def is_url(source: str) -> bool:
    """Whether a source is to be downloaded from an address."""
    return source.startswith(("http://", "https://"))


def write_corpus(
    source: str, target: Path, *, downloads: Path, roots: Iterable[Path], progress: Progress = unseen
) -> CorpusFacts:
    """Writes the text of a source to `target`.

    downloads: a folder that keeps what was downloaded; a known corpus put there by hand, as `<name>.txt`, is taken.
    roots: the folders that a relative path may start from, the first that has it wins.
    progress: called with the number of bytes that have just been downloaded, and with 0 during other work; what it
    raises ends the work.
    Raises DownloadError, and UserError if there is no such source or its text is empty or no UTF-8.
    """
    if source == PYTHON_DOCS:
        licence = "Python Software Foundation License"
        name = f"{PYTHON_DOCS} (CPython {platform.python_version()})"
        chunks: Iterator[str] = python_docs(progress)
    elif source in DOWNLOADS or is_url(source):
        download = DOWNLOADS.get(source) or Download(url=source, sha256=None, licence="unknown")
        licence, name = download.licence, download.url
        file_name = source if source in DOWNLOADS else hashlib.sha256(source.encode()).hexdigest()[:16]
        chunks = read_text([fetch(download, downloads / f"{file_name}.txt", progress)])
    else:
        licence = "unknown"
        path = find_path(source, roots)
        name = str(path)
        chunks = read_text(text_files(path))
    return _write(chunks, target, name, licence, progress)


def _write(chunks: Iterator[str], target: Path, source: str, licence: str, progress: Progress) -> CorpusFacts:
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
    return CorpusFacts(
        source=source,
        licence=licence,
        sha256=digest.hexdigest(),
        bytes=num_bytes,
        characters=num_characters,
        lines=num_lines,
    )


def find_path(source: str, roots: Iterable[Path]) -> Path:
    """The absolute path of a source. Raises UserError if there is none, and says what was looked for."""
    try:
        relative = Path(source).expanduser()
    except RuntimeError as error:  # ~somebody who is not known here
        raise UserError(f"corpus.source {source!r}: {error}") from None
    candidates = [Path(os.path.abspath(root / relative)) for root in roots]
    for path in candidates:
        if path.exists():
            return path
    raise UserError(
        f"corpus.source {source!r} is no known corpus ({', '.join(KNOWN)}), no http(s) URL, and no file or folder "
        f"at {candidates[0]}"
    )


def text_files(path: Path) -> list[Path]:
    """The files of a source: itself, or a folder's .txt and .md files at any depth, in the order of their paths.

    Links to folders are not followed, so that a circle of them cannot hang us; hidden files and folders are left out.
    Raises UserError if a folder has none, or the source is neither file nor folder.
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
    """The text of files, one after the other on lines of their own, in chunks.

    CRLF and lone CR become LF; a byte order mark at a file's start is dropped.
    Raises UserError with the byte offset where a file is no UTF-8, FileError if it cannot be read.
    """
    last = "\n"
    for path in files:
        if last != "\n":
            yield "\n"
        for chunk in _read_file(path):
            yield chunk
            last = chunk[-1]


def _read_file(path: Path) -> Iterator[str]:
    # 'utf-8-sig' drops the mark; the newline decoder keeps a CR at a chunk's end back until it knows what follows
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
                raise UserError(f"{path} changed while it was read; run again when it is at rest")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None


def _version(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def fetch(download: Download, path: Path, progress: Progress = unseen) -> Path:
    """The downloaded file, at `path`; nothing is downloaded if it lies there already with the right SHA-256.

    An unknown URL is downloaded each time, as its text may have changed. What was cut off never gets the file's name.
    Raises DownloadError.
    """
    if download.sha256 and path.is_file() and sha256_of(path) == download.sha256:
        return path
    try:
        request = urllib.request.Request(download.url, headers={"User-Agent": "gpt2-pipeline"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT_S) as response:  # noqa: S310 - http(s) only
            expected = response.headers.get("Content-Length")
            with atomic_write(path) as file:
                while data := response.read1(CHUNK_BYTES):
                    file.write(data)
                    progress(len(data))
                _check_download(file, download, expected)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise DownloadError(f"cannot download {download.url}: {reason}") from None
    return path


def _check_download(file: IO[bytes], download: Download, expected: str | None) -> None:
    size = file.tell()
    if expected is not None and size != int(expected):
        raise DownloadError(f"cannot download {download.url}: cut off after {size} of {expected} bytes")
    file.flush()
    if download.sha256 and (found := sha256_of(Path(file.name))) != download.sha256:
        raise DownloadError(f"{download.url} has SHA-256 {found}; expected {download.sha256}")


def python_docs(progress: Progress = unseen) -> Iterator[str]:
    """English text that ships inside CPython: the language reference's topics and the standard library's docstrings.

    About 2 MB; the same on every machine with the same CPython release. Only prose: without indentation, tables and
    rules. The pieces come in the order of their hashes, so that the held-out end of the text is like the rest.
    """
    from pydoc_data.topics import topics

    pieces = {prose(text) for text in (*topics.values(), *_docstrings(progress))}
    for piece in sorted(pieces, key=lambda piece: hashlib.sha256(piece.encode()).digest()):
        if len(piece) > MIN_PIECE_CHARACTERS:
            yield piece + "\n\n"


def prose(text: str) -> str:
    """A text without indentation, tables, rules and interactive sessions, and with single blank lines."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    kept = [line for line in lines if not line.startswith(("+", "|", "=", "-", "^", "~", "*", ">>>", "..."))]
    paragraphs = "\n".join(kept).split("\n\n")
    return "\n\n".join(paragraph.strip() for paragraph in paragraphs if paragraph.strip())


def _docstrings(progress: Progress) -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(library.rglob("*.py")):
        progress(0)
        folders = path.relative_to(library).parts[:-1]
        if not NOT_DOCUMENTATION.isdisjoint(folders):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # the standard library ships a few broken files for its own tests
            continue
        for node in ast.walk(tree):
            docstring = ast.get_docstring(node) if isinstance(node, documented) else None
            if docstring and docstring.isascii():
                yield docstring
