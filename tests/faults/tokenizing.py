"""SIGKILL of the process that tokenizes, which has two more, at random moments."""

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.conftest import ROOT, our_text, tokenize, write_documents
from tests.faults.result import Result

SIZES = {"shard_tokens": 2000, "block_bytes": 2000}
PROGRAM = """
import sys
from pathlib import Path
from tests.conftest import tokenize
from tests.faults.tokenizing import SIZES

def progress(count):
    print("block", flush=True)

if __name__ == "__main__":
    tokenize(Path(sys.argv[1]), processes=2, progress=progress, **SIZES)
    print("done", flush=True)
"""


def sums_of(folder: Path) -> dict[str, str]:
    """The sums of all files of the tokens, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "tokens").iterdir())}


def start(folder: Path) -> "subprocess.Popen[str]":
    """Tokenizes in another process. It prints a line after each block."""
    (folder / "program.py").write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, folder / "program.py", folder],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_blocks(process: "subprocess.Popen[str]", count: int) -> None:
    """Waits until a process has encoded some blocks, or has ended."""
    assert process.stdout is not None
    for _ in range(count):
        process.stdout.readline()


def killed_tokenizing(folder: Path, kills: int, seed: int = 0) -> Result:
    """Kills runs, each of which goes on where the last one was killed. The last run must end with the same bytes."""
    result = Result("SIGKILL of tokenizing at random times")
    draw = random.Random(seed)
    write_documents(folder, [our_text(30, seed) for seed in range(2 * kills)])
    tokenize(folder, **SIZES)
    expected = sums_of(folder)
    while result.cases < kills:
        process = start(folder)
        wait_for_blocks(process, draw.randrange(1, 40))
        time.sleep(draw.random() / 20)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        assert process.stdout is not None
        has_ended = "done" in process.stdout.read()
        process.wait()
        left = psutil.wait_procs(workers, timeout=5)[1]
        problem = f"left: {left}" if left else None
        if has_ended:  # it was too fast; begin again
            problem = problem or (None if sums_of(folder) == expected else "other bytes")
            (folder / "tokens/index.json").unlink()
        else:
            result.add(problem)
    tokenize(folder, **SIZES)
    result.add(None if sums_of(folder) == expected else "other bytes at the end")
    return result
