"""A corpus that needs no network: the documentation inside CPython."""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gpt2.progress import ProgressCallback, no_progress

NOT_DOCUMENTATION = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3"}
MIN_PIECE_CHARACTERS = 80


def python_docs(progress: ProgressCallback = no_progress) -> Iterator[str]:
    """English text that ships inside CPython: the language reference's topics and the standard library's docstrings.

    About 2 MB; the same on every machine with the same CPython release. Only prose: without indentation, tables and
    rules. The pieces are sorted by their hashes, so that the validation split resembles the training split.
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


def _docstrings(progress: ProgressCallback) -> Iterator[str]:
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
