"""A faulty disk: replaces `os` in gpt2.files, which performs all persistent writes."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

KILLED = 137
WRITE_CALLS = ("open", "write", "fsync", "chmod", "replace", "rename", "unlink", "rmdir", "makedirs")


class FaultyDisk:
    """Counts the calls that change the disk, and makes call number `fail_at` fail.

    how: "kill": the process dies in the middle of a write. "lost data": a power failure, which also empties files that
    were not synced. "lost names": also undoes files created, renamed or deleted whose folder was not synced.
    "ENOSPC", "EIO": the call raises, once. "full": the call and all later writes raise.
    """

    def __init__(self, fail_at: int | None = None, how: str = "kill") -> None:
        self.fail_at, self.how = fail_at, how
        self.calls: list[str] = []
        self._paths: dict[int, Path] = {}
        self._dirty: set[Path] = set()
        self._undo: list[tuple[Path, Callable[[], Any]]] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in WRITE_CALLS:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            number = len(self.calls)
            self.calls.append(name)
            fails = self.fail_at is not None and (
                number == self.fail_at or (self.how == "full" and number > self.fail_at)
            )
            if fails:
                self._fail(name, arguments)
            return getattr(self, f"_{name}", real)(*arguments, **options)

        return call

    def _fail(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.how in ("kill", "lost data", "lost names"):
            if name == "write":
                os.write(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            self._crash()
        if self.how == "full" and name not in ("open", "write", "makedirs"):
            return
        if name == "write" and self.how != "EIO":
            os.write(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
        code = errno.EIO if self.how == "EIO" else errno.ENOSPC
        raise OSError(code, os.strerror(code))

    def _crash(self) -> None:
        if self.how != "kill":
            if self.how == "lost names":
                for _, undo in reversed(self._undo):
                    undo()
            for path in self._dirty:
                if path.exists():
                    os.truncate(path, 0)
        os._exit(KILLED)

    def _open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        path = Path(path)
        is_new = not path.exists()
        descriptor = os.open(path, flags, mode)
        self._paths[descriptor] = path
        if is_new:
            self._changes_names(path, lambda: path.unlink(missing_ok=True))
        return descriptor

    def _write(self, descriptor: int, data: Any) -> int:
        self._dirty.add(self._paths[descriptor])
        return os.write(descriptor, data)

    def _fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)
        path = self._paths[descriptor]
        self._dirty.discard(path)
        self._undo = [(folder, undo) for folder, undo in self._undo if folder != path]

    def _changes_names(self, path: Path, undo: Callable[[], Any]) -> None:
        self._undo.append((path.parent, undo))

    def _move(self, source: Any, target: Any) -> None:
        source, target = Path(source), Path(target)
        before = target.read_bytes() if target.is_file() else None
        os.replace(source, target)

        def undo() -> None:
            if target.exists():
                os.replace(target, source)
            if before is not None:
                target.write_bytes(before)

        self._changes_names(target, undo)
        self._dirty = {
            target / path.relative_to(source) if path == source or source in path.parents else path
            for path in self._dirty
        }
        self._paths = {d: target if path == source else path for d, path in self._paths.items()}

    _replace = _rename = _move

    def _unlink(self, path: Any) -> None:
        path = Path(path)
        before = path.read_bytes()
        os.unlink(path)

        def undo() -> None:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(before)

        self._changes_names(path, undo)
        self._dirty.discard(path)

    def _rmdir(self, path: Any) -> None:
        path = Path(path)
        os.rmdir(path)
        self._changes_names(path, lambda: path.mkdir(exist_ok=True))

    def _makedirs(self, path: Any) -> None:
        path = Path(path)
        os.makedirs(path)

        def undo() -> None:
            for each in path.iterdir() if path.is_dir() else ():
                each.unlink()
            if path.is_dir():
                path.rmdir()

        self._changes_names(path, undo)
