"""The known corpora, and downloads with a pinned SHA-256."""

import http.client
import shutil
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gpt2.errors import FileError
from gpt2.files import atomic_write, sha256_of
from gpt2.progress import ProgressCallback, no_progress

DOWNLOAD_TIMEOUT_S = 20
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Download:
    """A corpus to download. sha256: None if it is not pinned."""

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
"""Names of corpora."""


class DownloadError(FileError):
    """A text could not be downloaded."""


def is_url(source: str) -> bool:
    """Whether a source is an http(s) URL."""
    return source.startswith(("http://", "https://"))


def download_file(download: Download, path: Path, progress: ProgressCallback = no_progress) -> Path:
    """Downloads to `path` and returns it. Skips the download if `path` already has the pinned SHA-256.

    A URL without a pinned SHA-256 is downloaded every time, because its text may have changed. The write is atomic, so
    `path` never holds a partial download. Raises DownloadError; FileError if the disk is too small for it.
    """
    if download.sha256 and path.is_file() and sha256_of(path) == download.sha256:
        return path
    try:
        request = urllib.request.Request(download.url, headers={"User-Agent": "gpt2-pipeline"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT_S) as response:  # noqa: S310 - http(s) only
            expected = response.headers.get("Content-Length")
            check_space(path.parent, int(expected or 0), download.url)
            with atomic_write(path) as file:
                while data := response.read1(CHUNK_BYTES):
                    file.write(data)
                    progress(len(data))
                _verify_download(file, download, expected)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise DownloadError(f"cannot download {download.url}: {reason}") from None
    return path


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises FileError if the disk of a folder has less than `needed` free bytes. what: is to be written."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise FileError(
            f"the text of {what} needs about {needed:,} bytes, but the disk of {folder} has {free:,} free; free some, "
            "or set corpus.limit"
        )


def _verify_download(file: IO[bytes], download: Download, expected: str | None) -> None:
    size = file.tell()
    if expected is not None and size != int(expected):
        raise DownloadError(f"cannot download {download.url}: received only {size} of {expected} bytes")
    file.flush()
    if download.sha256 and (found := sha256_of(Path(file.name))) != download.sha256:
        raise DownloadError(f"{download.url} has SHA-256 {found}; expected {download.sha256}")
