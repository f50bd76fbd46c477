"""Writes the documents of a corpus: a known corpus, Python's own documentation, files here or elsewhere.

Their texts become one UTF-8 file with LF line ends and without byte order marks, one directly after another, and a file
of where each ends. Both are written in constant memory.
"""

import hashlib
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TypedDict
from urllib.parse import urlsplit

from gpt2.data.documents import new_hash, record
from gpt2.data.limit import Limit, limited
from gpt2.data.sources.download import DOWNLOADS, KNOWN, PYTHON_DOCS, Download, check_space, download_file, is_url
from gpt2.data.sources.formats import SourceFile, documents_of, is_known, suffixes_of, text_bytes
from gpt2.data.sources.local import files_at, find_path, local_file
from gpt2.data.sources.python_docs import python_docs
from gpt2.data.sources.remote import HUB, hub_files, is_remote, remote_files
from gpt2.data.sources.text import Document
from gpt2.errors import UserError
from gpt2.files import atomic_write
from gpt2.progress import ProgressCallback, no_progress

MAX_BLANK_CHARACTERS = 1 << 26


@dataclass(frozen=True)
class CorpusInfo:
    """The resolved sources, and the size of the corpus.

    documents: number of them. skipped: rows and files without text. revision: commit of a data set of the Hub.
    """

    source: str
    licence: str
    sha256: str
    bytes: int
    characters: int
    lines: int
    documents: int
    skipped: int
    revision: str | None


@dataclass(frozen=True)
class Source:
    """A resolved source: its files, or a function that returns the chunks of its only document."""

    name: str
    licence: str = "unknown"
    revision: str | None = None
    files: list[SourceFile] = field(default_factory=list)
    text: Callable[[], Document] | None = None

    def documents(self, column: str) -> Iterator[Document]:
        """Its documents, each to be read before the next."""
        if self.text is not None:
            yield self.text()
        for file in self.files:
            yield from documents_of(file, column)


def write_corpus(
    source: str | Sequence[str],
    target: Path,
    documents: Path,
    *,
    downloads: Path,
    roots: Sequence[Path],
    text_column: str = "text",
    limit: Limit | None = None,
    progress: ProgressCallback = no_progress,
) -> CorpusInfo:
    """Writes the text of one or several sources to `target`, and the records of `gpt2.data.documents` to `documents`.

    downloads: the folder for downloaded files; a known corpus that was placed there by hand as `<name>.txt` is used.
    roots: folders that a relative path may start from; the first match wins.
    text_column: of the text in JSON lines, Parquet and CSV.
    progress: called with the number of bytes downloaded, or of text written, since the last call, and with 0 during
    other work. An exception from it stops the work.
    Raises DownloadError; UserError if a source does not exist or is not what its name says, or if there is no text;
    FileError if a file cannot be read, or the disk is too small.
    """
    sources = [_resolve(each, downloads, roots, progress) for each in ([source] if isinstance(source, str) else source)]
    name = ", ".join(each.name for each in sources)
    if limit is None or limit.unit == "bytes":
        needed = sum(text_bytes(file) for each in sources for file in each.files)
        check_space(target.parent, min(needed, limit.count) if limit else needed, name)
    blanks = _Blanks()
    found = limited(blanks.skip(chain.from_iterable(each.documents(text_column) for each in sources)), limit)
    text = _write(found, target, documents, name, progress)
    return CorpusInfo(
        source=name,
        licence=", ".join(dict.fromkeys(each.licence for each in sources)),
        revision=", ".join(each.revision for each in sources if each.revision) or None,
        skipped=blanks.count,
        **text,
    )


def local_files(source: str | Sequence[str], roots: Sequence[Path]) -> list[Path]:
    """The files on this machine that sources name, without downloaded ones. Raises UserError if one does not exist."""
    sources = [source] if isinstance(source, str) else source
    local = [each for each in sources if each not in KNOWN and not is_url(each) and not is_remote(each)]
    return list(dict.fromkeys(file for each in local for file in files_at(find_path(each, roots))))


def _resolve(source: str, downloads: Path, roots: Sequence[Path], progress: ProgressCallback) -> Source:
    if source == PYTHON_DOCS:
        name = f"{PYTHON_DOCS} (CPython {platform.python_version()})"
        return Source(name, "Python Software Foundation License", text=lambda: python_docs(progress))
    if source in DOWNLOADS:
        known = DOWNLOADS[source]
        path = download_file(known, downloads / f"{source}.txt", progress)
        return Source(known.url, known.licence, files=[local_file(path)])
    if is_url(source):
        file_name = PurePosixPath(urlsplit(source).path).name
        suffix = "".join(reversed(suffixes_of(file_name))) if is_known(file_name) else ""
        path = downloads / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}{suffix or '.txt'}"
        download_file(Download(url=source, sha256=None, licence="unknown"), path, progress)
        return Source(source, files=[replace(local_file(path), name=source, file_name=file_name)])
    if source.startswith(HUB):
        data_set = hub_files(source)
        return Source(data_set.name, data_set.licence, data_set.revision, data_set.files)
    if is_remote(source):
        return Source(source, files=remote_files(source))
    path = find_path(source, roots)
    return Source(str(path), files=[local_file(file) for file in files_at(path)])


@dataclass
class _Blanks:
    """The number of documents without text."""

    count: int = 0

    def skip(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents that have text. One that starts with a lot of white space counts as text."""
        for document in documents:
            chunks = iter(document)
            head: list[str] = []
            for chunk in chunks:
                head.append(chunk)
                if (chunk and not chunk.isspace()) or sum(map(len, head)) > MAX_BLANK_CHARACTERS:
                    yield chain(head, chunks)
                    break
            else:
                self.count += 1


class _Text(TypedDict):
    sha256: str
    bytes: int
    characters: int
    lines: int
    documents: int


def _write(
    documents: Iterator[Document], target: Path, records: Path, source: str, progress: ProgressCallback
) -> _Text:
    digest = hashlib.sha256()
    num_bytes = num_characters = num_lines = num_documents = 0
    with atomic_write(records) as ends, atomic_write(target) as file:
        for document in documents:
            start, document_digest = num_bytes, new_hash()
            for chunk in document:
                data = chunk.encode()
                file.write(data)
                digest.update(data)
                document_digest.update(data)
                num_bytes += len(data)
                num_characters += len(chunk)
                num_lines += chunk.count("\n")
                progress(len(data))
            if num_bytes > start:  # a limit may leave nothing of the last one
                ends.write(record(num_bytes, document_digest))
                num_documents += 1
        if not num_documents:
            raise UserError(f"the corpus {source} has no text; choose another corpus.source")
        # the text is renamed first: without records it is incomplete, but never with those of another text
        records.unlink(missing_ok=True)
    return {
        "sha256": digest.hexdigest(),
        "bytes": num_bytes,
        "characters": num_characters,
        "lines": num_lines,
        "documents": num_documents,
    }
