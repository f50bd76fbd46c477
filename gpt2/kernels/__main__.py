"""Compiles the library for this CPU, checks it, and puts it in its place: python -m gpt2.kernels."""

import os
import sys
import tempfile
from pathlib import Path

from gpt2.errors import one_line
from gpt2.kernels.compiled import check
from gpt2.kernels.library import CompileError, compile_source, library_path, load


def main() -> None:
    """Exits with 1 and a line on standard error if there is no library afterwards."""
    target = library_path()
    if target.is_file():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            new = Path(folder) / target.name
            compile_source(new)
            check(load(new))
            os.replace(new, target)
    except (CompileError, OSError) as error:
        sys.exit(one_line(error, 300))


if __name__ == "__main__":
    main()
