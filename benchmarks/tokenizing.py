"""Speed and memory of the tokenize stage, beside tiktoken's own `encode_ordinary_batch`.

    python -m benchmarks.tokenizing                  2 GB, half an hour
    python -m benchmarks.tokenizing --megabytes 200

The text is made here: the Python files and the documentation of the installed packages, a document each, in random
order, again and again up to the size. Each contender runs in a process of its own, in turns. Ours does all that the
stage does: it splits, encodes, writes and syncs the shards and computes their sums. tiktoken only encodes, with the
text in memory, 64 MB of documents at a time, and forgets the tokens. The memory is the peak of one process. A second
file is one line without white space. Writes reports/benchmarks/tokenizing.{json,md}.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generation import machine
from gpt2.config import TokenizeConfig
from gpt2.data.documents import DOCUMENT_TYPE, hash_of, new_hash, read_documents

REPORT = Path("reports/benchmarks")
SUFFIXES = {".py", ".md", ".rst", ".txt"}
MAX_DOCUMENT_BYTES = 1 << 20
BATCH_BYTES = 64_000_000
LINE_SHARE = 4
"""The line without white space has a quarter of the size."""
CONTENDERS = (("ours", 1), ("tiktoken", 1), ("ours", 2), ("tiktoken", 2))


def main() -> None:
    """Makes the texts, measures all contenders, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000, help="size of the text (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="for the texts and tokens (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        texts, line = Path(name) / "texts", Path(name) / "line"
        write_texts(texts, arguments.megabytes * 1_000_000)
        write_line(line, texts, arguments.megabytes * 1_000_000 // LINE_SHARE)
        rounds = [[measure(*each, texts) for each in CONTENDERS] for _ in range(arguments.rounds)]
        rows = [median(list(runs)) for runs in zip(*rounds, strict=True)]
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "cpu": machine.cpu_name(Path("/proc/cpuinfo").read_text(encoding="utf-8"), os.environ),
            "megabytes": arguments.megabytes,
            "rounds": arguments.rounds,
            "documents": len(read_documents(texts / "documents.bin")),
            "rows": rows,
            "line": measure("ours", 2, line),
        }
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / "tokenizing.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    (REPORT / "tokenizing.md").write_text(text)
    print(text)


def package_texts() -> Iterator[bytes]:
    """The texts of the installed packages, in the order of their paths."""
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*")):
        if path.suffix in SUFFIXES and path.is_file() and 0 < path.stat().st_size < MAX_DOCUMENT_BYTES:
            data = path.read_bytes()
            try:
                data.decode()
            except UnicodeDecodeError:
                continue
            yield data


def write_texts(folder: Path, num_bytes: int) -> None:
    """corpus.txt and documents.bin, as the fetch stage writes them, of that size or a document more."""
    documents, draw = list(package_texts()), np.random.default_rng(0)

    def parts() -> Iterator[bytes]:
        while True:
            yield from (documents[i] for i in draw.permutation(len(documents)))

    write(folder, parts(), num_bytes)


def write_line(folder: Path, texts: Path, num_bytes: int) -> None:
    """The same without white space, as one document."""

    def parts() -> Iterator[bytes]:
        while True:
            with (texts / "corpus.txt").open(encoding="utf-8", newline="") as file:
                while text := file.read(1 << 20):
                    yield re.sub(r"\s", "", text).encode()

    write(folder, parts(), num_bytes)
    records = np.fromfile(folder / "documents.bin", dtype=DOCUMENT_TYPE)
    records[-1:].tofile(folder / "documents.bin")


def write(folder: Path, parts: Iterator[bytes], num_bytes: int) -> None:
    """Writes documents up to a size."""
    folder.mkdir()
    size = 0
    with (folder / "corpus.txt").open("wb") as corpus, (folder / "documents.bin").open("wb") as documents:
        while size < num_bytes:
            data = next(parts)
            corpus.write(data)
            size += len(data)
            digest = new_hash()
            digest.update(data)
            documents.write(np.array([(size, hash_of(digest))], dtype=DOCUMENT_TYPE).tobytes())


def measure(name: str, processes: int, folder: Path) -> dict[str, Any]:
    """What a contender reaches on a text, in a process of its own."""
    program = f"from benchmarks.tokenizing import work; work({name!r}, {processes}, {str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    print(found, file=sys.stderr, flush=True)
    return found


def work(name: str, processes: int, folder: str) -> None:
    """Runs a contender, and prints the result as JSON."""
    root = Path(folder)
    seconds, tokens = encode_ours(root, processes) if name == "ours" else encode_tiktoken(root, processes)
    peak = max(own_peak_kib(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024
    size = (root / "corpus.txt").stat().st_size
    facts = {"name": name, "processes": processes, "seconds": seconds, "tokens": tokens}
    print(json.dumps({**facts, "mb_per_s": size / 1e6 / seconds, "peak_bytes": peak}))


def own_peak_kib() -> int:
    """The peak memory of this process. `ru_maxrss` would include that of the process that started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found
    return int(found[1])


def encode_ours(root: Path, processes: int) -> tuple[float, int]:
    """Seconds and number of tokens of what the stage does."""
    from gpt2.data.tokenizing.shards import write_tokens

    config = TokenizeConfig(0.005, "documents" if root.name == "texts" else "tail", False)
    files = (root / "corpus.txt", root / "documents.bin", root / "tokens")
    start_s = time.perf_counter()
    index = write_tokens(*files, config, partial=root / "tokens.partial", processes=processes)
    return time.perf_counter() - start_s, sum(split["tokens"] for split in index["splits"].values())


def encode_tiktoken(root: Path, threads: int) -> tuple[float, int]:
    """Seconds of encoding, and number of tokens."""
    from gpt2 import tokenizer

    encoding = tokenizer.encoding()
    ends = [int(end) for end in read_documents(root / "documents.bin")["end"]]
    seconds, tokens, first = 0.0, 0, 0
    with (root / "corpus.txt").open("rb") as file:
        while first < len(ends):
            texts = []
            start = file.tell()
            while first < len(ends) and file.tell() - start < BATCH_BYTES:
                texts.append(file.read(ends[first] - file.tell()).decode())
                first += 1
            start_s = time.perf_counter()
            encoded = encoding.encode_ordinary_batch(texts, num_threads=threads)
            seconds += time.perf_counter() - start_s
            tokens += sum(map(len, encoded))
    return seconds, tokens


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the median speed, and the highest memory."""
    middle = statistics.median_low(run["seconds"] for run in runs)
    chosen = next(run for run in runs if run["seconds"] == middle)
    return {**chosen, "peak_bytes": max(run["peak_bytes"] for run in runs)}


def table(result: dict[str, Any]) -> str:
    """The report as Markdown."""
    speed = {(row["name"], row["processes"]): row["mb_per_s"] for row in result["rows"]}
    lines = [
        "# Tokenizing",
        "",
        f"Made by `python -m benchmarks.tokenizing` on {result['cpu']}: {result['megabytes']:,} MB of package texts, "
        f"{result['documents']:,} documents; the median of {result['rounds']} rounds.",
        "",
        "| | processes or threads | MB/s | beside tiktoken | peak memory of a process |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        beside = row["mb_per_s"] / speed["tiktoken", row["processes"]]
        name = "the tokenize stage" if row["name"] == "ours" else "tiktoken's encode_ordinary_batch"
        lines.append(
            f"| {name} | {row['processes']} | {row['mb_per_s']:.1f} | {beside:.2f} | {row['peak_bytes'] / 1e6:.0f} MB |"
        )
    line = result["line"]
    lines += [
        "",
        f"Two processes of the stage are {speed['ours', 2] / speed['ours', 1]:.2f} times as fast as one. A line of "
        f"{result['megabytes'] // LINE_SHARE:,} MB without white space: {line['mb_per_s']:.1f} MB/s with 2 processes, "
        f"{line['peak_bytes'] / 1e6:.0f} MB of memory in a process.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
