"""Writing files so that a reader finds the old content or the new, whole, whatever happens in between.

All files that outlive a process are written here: to a temporary file beside the target, fsync, rename, fsync of the
folder.
"""

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gpt2.errors import BusyError

TEMPORARY = ".tmp"


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path to write to, whose file becomes `path` when the block ends, and disappears if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}{TEMPORARY}.{path.name}")  # keeps the suffix that some look at
    try:
        yield temporary
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that becomes `path` when the block ends, and disappears if it raises."""
    with staged(path) as temporary, temporary.open("wb") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Writes a text file, UTF-8 with LF."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Writes JSON for people and for git: indented, and valid (NaN raises ValueError)."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_with(path: Path, save: Callable[[str], object]) -> None:
    """Writes a file by a function that takes a path, such as safetensors' `save_file` or a figure's `savefig`."""
    with staged(path) as temporary:
        save(str(temporary))


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder last, where the system can (Windows cannot open a folder)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def hold(lock: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock file for the block; the system lets go of it when the process ends in whatever way.

    If another process has it: waits, or else raises BusyError, which names the holder. Without fcntl (Windows) nothing
    is locked.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise BusyError(
                f"{lock.parent} is in use by {holder}; wait until it ends, or stop it, and try again"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
