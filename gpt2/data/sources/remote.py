"""Files elsewhere, read as streams: a data set of the Hugging Face Hub, and all that fsspec opens (s3, gs, ...)."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from gpt2.data.sources.download import DownloadError
from gpt2.data.sources.formats import KNOWN_FORMATS, SourceFile, is_known, needs_seek
from gpt2.errors import GPT2Error, UserError, one_line

HUB = "hf://datasets/"
PARQUET_ALIAS, PARQUET_REVISION = "~parquet", "refs/convert/parquet"
"""The Hub's automatic conversion of each data set."""
DEFAULT_FILES = "default/train/*.parquet"
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
"""What fsspec needs beside it."""
BUFFER_BYTES = 1 << 20


def is_remote(source: str) -> bool:
    """Whether a source is read through fsspec: an address, but not of http(s), which is downloaded."""
    return "://" in source and not source.startswith(("http://", "https://"))


@dataclass(frozen=True)
class DataSet:
    """Files of a data set of the Hub. name: its address at the commit `revision`. licence: as on its card."""

    name: str
    licence: str
    revision: str
    files: list[SourceFile]


def hub_files(source: str) -> DataSet:
    """The files of hf://datasets/OWNER/NAME[@REVISION][/PATH].

    The revision is resolved to a commit before anything is listed or read. PATH is a file, a folder or a pattern.
    Without a revision and a path: the train split of the configuration `default`, as the Hub converts it to Parquet.
    Raises UserError for an address of another form; DownloadError if the data set, the revision or a file is missing
    or not accessible, or the Hub cannot be reached.
    """
    try:
        from huggingface_hub import HfApi, HfFileSystem, parse_hf_uri
        from huggingface_hub.errors import HfUriError
    except ImportError:
        raise UserError(f"{source} needs the package huggingface_hub: pip install 'huggingface_hub>=2,<3'") from None
    try:
        address = parse_hf_uri(source)
    except HfUriError:
        raise UserError(f"corpus.source {source!r} is not of the form {HUB}OWNER/NAME[@REVISION][/PATH]") from None
    revision, path = address.revision, address.path_in_repo
    if revision is None and not path:
        revision, path = PARQUET_ALIAS, DEFAULT_FILES
    with _reading(source):
        name = PARQUET_REVISION if revision == PARQUET_ALIAS else revision
        info = HfApi().dataset_info(address.id, revision=name)
        licence = (info.card_data.get("license") if info.card_data else None) or "unknown"
        system = HfFileSystem(skip_instance_cache=True)
        root = f"datasets/{address.id}@{info.sha}"
        place = f"{root}/{path}".rstrip("/")
        files = _files(system, place)
        if not files:
            raise DownloadError(f"{source} has no file {path or '(' + KNOWN_FORMATS + ')'}; {_listed(system, root)}")
    return DataSet(f"hf://{place}", str(licence), str(info.sha), files)


def _listed(system: Any, root: str) -> str:
    folders = sorted({path.removeprefix(f"{root}/").rpartition("/")[0] for path in system.find(root)} - {""})
    shown = ", ".join(folders[:10]) + (f" and {len(folders) - 10} more" if len(folders) > 10 else "")
    return f"its folders are {shown or 'none'}; name one: {HUB}OWNER/NAME@REVISION/FOLDER/*.parquet"


def remote_files(source: str) -> list[SourceFile]:
    """The files of an address that fsspec opens: a file, a folder or a pattern.

    Raises UserError if the package for it is missing; DownloadError if there is no such file, or it cannot be reached.
    """
    import fsspec

    with _reading(source):
        try:
            system, path = fsspec.core.url_to_fs(source)
        except ImportError as error:
            package = PACKAGES.get(source.partition("://")[0])
            remedy = f"pip install {package}" if package else one_line(error)
            raise UserError(f"corpus.source {source} needs a package that is missing: {remedy}") from None
        except ValueError as error:
            raise UserError(f"corpus.source {source}: {one_line(error)}") from None
        files = _files(system, path)
        if not files:
            raise DownloadError(f"{source} has no file of a known format: {KNOWN_FORMATS}")
    return files


def _files(system: Any, path: str) -> list[SourceFile]:
    """The files of a path, a folder or a pattern, in the order of their paths."""
    if any(character in path for character in "*?["):
        found = system.glob(path, detail=True)
    elif system.isdir(path):
        found = {name: info for name, info in system.find(path, detail=True).items() if _is_wanted(name)}
    else:
        found = {path: system.info(path)}
    return [
        SourceFile(
            name=system.unstrip_protocol(name),
            file_name=name.rpartition("/")[2],
            size=info.get("size"),
            open=partial(_open, system, name),
        )
        for name, info in sorted(found.items())
        if info["type"] == "file"
    ]


def _is_wanted(path: str) -> bool:
    name = path.rpartition("/")[2]
    return is_known(name) and name != "README.md"  # the card of a data set


def _open(system: Any, path: str) -> IO[bytes]:
    name = system.unstrip_protocol(path)
    options = {"block_size": 0} if name.startswith("hf://") and not needs_seek(path) else {}  # one request, no ranges
    with _reading(name):
        return io.BufferedReader(_RemoteFile(system.open(path, "rb", **options), name), BUFFER_BYTES)


class _RemoteFile(io.RawIOBase):
    """A file of fsspec whose failures are DownloadErrors."""

    def __init__(self, file: Any, name: str) -> None:
        self._file = file
        self._name = name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def readinto(self, buffer: Any) -> int:
        with _reading(self._name):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except GPT2Error:
        raise
    except Exception as error:  # each file system has its own
        raise DownloadError(f"cannot read {name}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    reasons = {
        "RepositoryNotFoundError": "there is no such data set, or it is private: hf auth login",
        "RevisionNotFoundError": "there is no such revision",
        "GatedRepoError": "it is gated: accept its terms on its page, then hf auth login",
        "DisabledRepoError": "the Hub has disabled it",
        "FileNotFoundError": "there is no such file",
        "ConnectError": "no connection",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    }
    return reasons.get(type(error).__name__) or one_line(error)
