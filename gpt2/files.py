"""Atomic file writes: a reader sees the old content or the new content, even if the writer is killed.

A file is written beside its target, synced (fsync) and renamed, and its folder is synced. A folder is written as a
staging folder, with a manifest of SHA-256 sums last, and then renamed. Readers verify the sums.
"""

import errno
import hashlib
import io
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from gpt2.errors import BusyError, FileError

TEMPORARY = ".tmp"
MANIFEST_FILE = "manifest.json"
BUFFER_BYTES = 1 << 20
Writers = Mapping[str, Callable[[IO[bytes]], object]]


def cache_folder() -> Path:
    """The folder of this user for compiled code and measurements."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2"


class _UnbufferedFile(io.RawIOBase):
    """A new file that is written through `os`, without a buffer."""

    def __init__(self, path: Path, flags: int) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0) | flags, 0o644)
        self.name = str(path)
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return os.write(self.descriptor, data)
        except OSError as error:
            self.failure = error
            raise

    def tell(self) -> int:
        return os.lseek(self.descriptor, 0, os.SEEK_CUR)

    def fileno(self) -> int:
        return self.descriptor

    def close(self) -> None:
        if not self.closed:
            os.close(self.descriptor)
        super().close()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path whose file is renamed to `path` when the block ends, and deleted if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = path.with_name(f".{os.getpid()}{TEMPORARY}.{path.name}")  # same suffix: savefig needs it
    try:
        yield temporary
        os.chmod(temporary, 0o644)  # safetensors creates files that only their owner can read
        fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    fsync(path.parent)


def _remove_leftovers(path: Path) -> None:
    """Deletes temporary files of killed processes."""
    for leftover in path.parent.glob(f".*{TEMPORARY}.{path.name}"):
        pid = leftover.name.removeprefix(".").partition(TEMPORARY)[0]
        if pid.isdigit() and not _is_alive(int(pid)):
            with suppress(OSError):
                os.unlink(leftover)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that is renamed to `path` when the block ends, and deleted if it raises."""
    with atomic_path(path) as temporary, _new_file(temporary) as file:
        yield file


@contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    raw = _UnbufferedFile(path, os.O_TRUNC)
    file = io.BufferedWriter(raw, BUFFER_BYTES)
    try:
        yield file
        file.flush()
    except Exception:
        if raw.failure is not None:  # torch raises another error instead
            raise raw.failure from None
        raise
    finally:
        raw.close()  # without flushing again after a failure


def write_text(path: Path, text: str) -> None:
    """Writes a text file, UTF-8 with LF."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON. Raises ValueError for NaN and infinities, which are not JSON."""
    write_text(path, _json(content))


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def atomic_save(path: Path, save: Callable[[str], object]) -> None:
    """Writes a file by a function that takes a path, such as safetensors' `save_file` or a figure's `savefig`."""
    with atomic_path(path) as temporary:
        save(str(temporary))


class JsonLines:
    """An append-only JSON lines file. Other processes see a line at once; it is not synced to the disk.

    The last line may be truncated; `read_json_lines` skips such a line.
    """

    def __init__(self, path: Path, lines: list[dict[str, Any]]) -> None:
        """Creates or replaces the file with these lines."""
        with atomic_write(path) as file:
            file.writelines(map(_json_line, lines))
        self._file = _UnbufferedFile(path, os.O_APPEND)

    def append(self, content: dict[str, Any]) -> None:
        """Appends a line. Raises OSError."""
        data = _json_line(content)
        if self._file.write(data) != len(data):
            raise OSError(f"the disk is full: {self._file.name}")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _json_line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read_json_lines(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The complete lines of a JSON lines file from a byte offset on, and the offset after them."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    data = data[: data.rfind(b"\n") + 1]
    return [json.loads(line) for line in data.splitlines()], offset + len(data)


def fsync(path: Path) -> None:
    """Syncs a file, or the entries of a folder, to the disk. Windows and some mounts cannot sync folders."""
    is_folder = path.is_dir()
    if is_folder and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BUFFER_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_folder(folder: Path, files: Writers, facts: dict[str, Any], ready: Mapping[Path, str] | None = None) -> None:
    """Writes files into a new folder, each with its function, and a manifest with `facts` and the SHA-256 of each file.

    ready: files that move into it, synced, with their sums. The write is atomic. Raises FileExistsError if the folder
    exists, OSError, and exceptions of the functions.
    """
    staging = folder.with_name(folder.name + TEMPORARY)
    delete_folder(staging)
    os.makedirs(staging)
    sums = {}
    for name, write in files.items():
        with _new_file(staging / name) as file:
            write(file)
        # computes the sum while fsync waits for the disk
        with ThreadPoolExecutor(max_workers=1) as thread:
            synced = thread.submit(fsync, staging / name)
            sums[name] = sha256_of(staging / name)
            synced.result()
    for path, known in (ready or {}).items():
        os.rename(path, staging / path.name)
        sums[path.name] = known
    write_text(staging / MANIFEST_FILE, _json({**facts, "sha256": sums}))
    if folder.exists():
        raise FileExistsError(f"{folder} already exists")
    os.rename(staging, folder)
    fsync(folder.parent)


def verify_folder(folder: Path, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """The manifest of a folder that `write_folder` wrote. With several parts, verifies only every parts-th file.

    Raises FileError if anything in it is missing or changed.
    """
    try:
        text = (folder / MANIFEST_FILE).read_text(encoding="utf-8")
        manifest: dict[str, Any] = json.loads(text)
        if _json(manifest) != text:
            raise ValueError("its text was changed")
        sums = dict(manifest["sha256"])
    except FileNotFoundError:
        raise FileError(f"{folder} is incomplete: it has no {MANIFEST_FILE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{folder / MANIFEST_FILE} is damaged ({type(error).__name__}: {error})") from None
    for name, expected in list(sums.items())[part::parts]:
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            raise FileError(f"cannot read {folder / name}: {error.strerror}") from None
        if found != expected:
            raise FileError(f"{folder / name} is damaged: its SHA-256 is not the manifest's")
    return manifest


def delete_folder(folder: Path) -> None:
    """Deletes a folder of `write_folder`, the manifest first, so that a partial folder never looks complete."""
    if not folder.is_dir():
        return
    if (folder / MANIFEST_FILE).exists():
        os.unlink(folder / MANIFEST_FILE)
        fsync(folder)
    for path in list(folder.iterdir()):
        os.unlink(path)
    os.rmdir(folder)


@contextmanager
def file_lock(lock: Path, *, wait_s: float = 0, what: str | None = None) -> Iterator[None]:
    """Holds a lock file for the block. The system releases it whenever the process ends.

    Raises BusyError if another process still holds it after `wait_s`. The message names that process, and `what` is
    locked (None: the lock's folder). Does not lock without fcntl (Windows), or on a file system without locks.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise BusyError(
                    f"{what or lock.parent} is in use by {holder}; wait until it ends, or stop it, and try again",
                    holder,
                ) from None
            except OSError:  # a file system without locks, such as some network and Drive mounts
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
