"""Files on this machine: a path, a folder or a glob pattern."""

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from gpt2.data.sources.download import KNOWN
from gpt2.data.sources.formats import KNOWN_FORMATS, SourceFile, is_known
from gpt2.errors import FileError, UserError

GLOB_CHARACTERS = frozenset("*?[")


def find_path(source: str, roots: Iterable[Path]) -> Path:
    """The absolute path of a file or a folder, or a glob pattern with an absolute path.

    roots: folders that a relative path may start from; the first with such a file wins.
    Raises UserError if there is none.
    """
    try:
        relative = Path(source).expanduser()
    except RuntimeError as error:  # ~user with an unknown user
        raise UserError(f"corpus.source {source!r}: {error}") from None
    candidates = [Path(os.path.abspath(root / relative)) for root in roots]
    for path in candidates:
        if path.exists() or (_is_pattern(path) and _matches(path)):
            return path
    if _is_pattern(relative):
        raise UserError(f"corpus.source {source!r}: no file matches {candidates[0]}")
    raise UserError(
        f"corpus.source {source!r} is not a known corpus ({', '.join(KNOWN)}) or a URL (http, https, hf, s3, gs), and "
        f"there is no file or folder at {candidates[0]}"
    )


def files_at(path: Path) -> list[Path]:
    """The files of a path that `find_path` found, in the order of their paths.

    A folder's files are those of a known format at any depth; a pattern's are all that it matches, with `**` for any
    folders. Skips hidden files and folders; does not follow links to folders, which may form a cycle.
    Raises UserError if there is no file.
    """
    if path.is_file():
        return [path]
    if _is_pattern(path) and not path.exists():
        return _matches(path)
    if not path.is_dir():
        raise UserError(f"{path} is neither a file nor a folder")
    found: list[Path] = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if is_known(name)]
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise UserError(f"the folder {path} has no file of a known format: {KNOWN_FORMATS}")
    return files


def local_file(path: Path) -> SourceFile:
    """A file on this machine, to read. Raises FileError if it cannot be."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None
    return SourceFile(str(path), path.name, size, lambda: path.open("rb"), partial(_version, path))


def _version(path: Path) -> Sequence[int]:
    status = path.stat()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _is_pattern(path: Path) -> bool:
    return not GLOB_CHARACTERS.isdisjoint(str(path))


def _matches(pattern: Path) -> list[Path]:
    parts = pattern.parts
    fixed = next(i for i, part in enumerate(parts) if not GLOB_CHARACTERS.isdisjoint(part))
    folder = Path(*parts[:fixed])
    try:
        found = [path for path in folder.glob(str(Path(*parts[fixed:]))) if path.is_file()]
    except ValueError as error:
        raise UserError(f"corpus.source {pattern} is not a glob pattern: {error}") from None
    return sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts))
