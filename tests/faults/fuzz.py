"""Fuzzed corpora and params files."""

import bz2
import csv
import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from ruamel.yaml import YAML

from gpt2 import tokenizer
from gpt2.data import corpus
from gpt2.data.sources import text as source_text
from gpt2.data.token_files import open_tokens
from gpt2.errors import GPT2Error
from stages.params import Params, load_params
from tests.conftest import ROOT, our_text, tokenize
from tests.faults.result import Result

STRANGE = (
    "\ufeff",
    "\r\n",
    "\r",
    "\0",
    "\ufffd",
    "\u202eabc\u202c",
    "👩‍👩‍👧‍👦",
    "<|endoftext|>",
    "é",
    "e\u0301",
    "漢字",
    "مرحبا",
    "\u2028",
    "\u00a0",
    "\t",
    "  ",
    "\n\n\n",
    "\x1b[31m",
    "'s",
    "a" * 5000,
    "\U0010ffff",
    "\x7f",
    "\x85",
)
BYTES = (b"\xff", b"\xfe\xff", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\x80abc", b"\xf8\x88\x80\x80\x80")


def a_corpus(draw: random.Random) -> bytes:
    """The bytes of a random text file, often with unusual content."""
    text = our_text(draw.choice([0, 1, 3, 40, 200]), draw.randrange(99))
    for _ in range(draw.choice([0, 1, 3, 30])):
        place = draw.randrange(len(text) + 1)
        text = text[:place] + draw.choice(STRANGE) + text[place:]
    if draw.random() < 0.1:
        return text.encode("utf-16")
    if draw.random() < 0.1:
        return text.encode("latin-1", errors="ignore")
    content = text.encode()
    if draw.random() < 0.2:
        place = draw.randrange(len(content) + 1)
        content = content[:place] + draw.choice(BYTES) + content[place:]
    return content


def corpora(folder: Path, cases: int, seed: int = 0) -> Result:
    """Each corpus must be encoded into tokens that decode to its text, or refused with a one-line error."""
    draw = random.Random(seed)
    result = Result("fuzzed corpora")
    for number in range(cases):
        case = folder / str(number)
        case.mkdir(parents=True)
        source = case / "mine.txt"
        content = a_corpus(draw)
        source.write_bytes(content)
        chunk = source_text.CHUNK_BYTES
        source_text.CHUNK_BYTES = draw.choice([7, 64, chunk])
        try:
            result.add(corpus_problem(case, source, content))
        finally:
            source_text.CHUNK_BYTES = chunk
    return result


def corpus_problem(case: Path, source: Path, content: bytes) -> str | None:
    """Describes a failure of a case, or returns None."""

    def read() -> None:
        corpus.write_corpus(str(source), case / "corpus.txt", case / "documents.bin", downloads=case, roots=[case])
        tokenize(case)

    if problem := problem_of(read):
        return f"{content[:80]!r}: {problem}"
    if source.read_bytes() != content:
        return f"{content[:80]!r}: the user's file was changed"
    if not (case / "tokens/index.json").exists():
        return None  # it was refused, in one line
    text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    if (case / "corpus.txt").read_bytes().decode() != text:
        return f"{content[:80]!r}: another text"
    ids = [int(token) for split in ("train", "val") for token in open_tokens(case / "tokens", split)[:]]
    return None if tokenizer.decode(ids) == text else f"{content[:80]!r}: decode(encode(x)) != x"


def a_source_file(draw: random.Random) -> tuple[str, bytes]:
    """The name and the bytes of a file of rows, maybe compressed or in an archive, often damaged."""
    texts = [our_text(draw.choice([0, 1, 9]), draw.randrange(99)) + draw.choice(STRANGE) for _ in range(5)]
    suffix = draw.choice([".jsonl", ".csv", ".parquet"])
    stream = io.BytesIO()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), stream)
    elif suffix == ".csv":
        lines = io.StringIO(newline="")
        csv.writer(lines).writerows([["text"], *([text] for text in texts)])
        stream.write(lines.getvalue().encode())
    else:
        stream.writelines(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)
    packing = draw.choice(["", ".gz", ".bz2", ".zst", ".zip"])
    content = _damaged(draw, stream.getvalue()) if draw.random() < 0.5 else stream.getvalue()
    if packing == ".gz":
        content = gzip.compress(content)
    elif packing == ".bz2":
        content = bz2.compress(content)
    elif packing == ".zst":
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    elif packing == ".zip":
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            archive.writestr(draw.choice(["a", "../a", "/a", "a\nb"]) + suffix, content)
        content, suffix = stream.getvalue(), ""
    return f"mine{suffix}{packing}", _damaged(draw, content) if draw.random() < 0.5 else content


def _damaged(draw: random.Random, content: bytes) -> bytes:
    """Bytes of which some are changed, or the last ones missing."""
    if draw.random() < 0.3:
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(draw.choice([1, 3, 30])):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def source_files(folder: Path, cases: int, seed: int = 0) -> Result:
    """Each file of rows must be read, or refused with a one-line error, and nothing else written."""
    draw = random.Random(seed)
    result = Result("fuzzed files of rows")
    for number in range(cases):
        case = folder / str(number)
        case.mkdir(parents=True)
        name, content = a_source_file(draw)
        (case / name).write_bytes(content)
        problem = problem_of(
            lambda case=case, name=name: corpus.write_corpus(
                name, case / "corpus.txt", case / "documents.bin", downloads=case, roots=[case]
            )
        )
        written = {path.name for path in case.rglob("*")} - {name}
        if problem is None and written not in (set(), {"corpus.txt", "documents.bin"}):
            problem = f"left behind: {written}"
        result.add(problem and f"{name} {content[:80]!r}: {problem}")
    return result


def problem_of(action: Callable[[], object]) -> str | None:
    """None if an action succeeds or raises a GPT2Error with a one-line message."""
    try:
        action()
    except GPT2Error as error:
        message = str(error)
        return None if message and "\n" not in message else f"message of several lines: {message!r}"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    return None


VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    10**6,
    10**30,
    -0.0,
    0.5,
    1.5,
    -1e-300,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "6e-4",
    "null",
    "yes",
    [],
    [1],
    {},
    {"a": 1},
    "a" * 10000,
    "\0",
    "../../etc/passwd",
    2**63,
    "2024-01-01",
)


def mutated(draw: random.Random, text: str) -> str:
    """A params file with one to three mistakes."""
    yaml = YAML()
    content = yaml.load(text)
    for _ in range(draw.choice([1, 1, 2, 3])):
        section = draw.choice(list(content) or ["corpus"])
        keys = list(content.get(section) or []) if isinstance(content.get(section), dict) else []
        way = draw.choice(["value", "value", "value", "misspell", "remove", "add", "section"])
        if way == "section" or not keys:
            change = draw.choice(["remove", "value", "misspell"])
            if change == "remove":
                content.pop(section, None)
            elif change == "value":
                content[section] = draw.choice(VALUES)
            else:
                content[section[:-1] + "x"] = content.pop(section, None)
            continue
        key = draw.choice(keys)
        if way == "value":
            content[section][key] = draw.choice(VALUES)
        elif way == "misspell":
            place = draw.randrange(len(key))
            content[section][key[:place] + draw.choice("xyz") + key[place + 1 :]] = content[section].pop(key)
        elif way == "remove":
            del content[section][key]
        else:
            content[section][draw.choice(["extra", "n_layers", "1", "lr"])] = draw.choice(VALUES)
    from io import StringIO

    stream = StringIO()
    yaml.dump(content, stream)
    return stream.getvalue()


def garbled(draw: random.Random, text: str) -> str:
    """A params file that may be invalid YAML."""
    characters = list(text)
    for _ in range(draw.choice([1, 2, 5, 50])):
        place = draw.randrange(len(characters))
        if draw.random() < 0.5:
            characters[place] = draw.choice("\t\0:[]{}&*!|>'\"%@`#-?, \n\ufeff\x85")
        else:
            del characters[place]
    return "".join(characters)


def params_files(folder: Path, cases: int, seed: int = 0) -> Result:
    """Each must be accepted, or refused in one message with one line per problem."""
    draw = random.Random(seed)
    text = (ROOT / "params.yaml").read_text()
    result = Result("fuzzed params files")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "params.yaml"
    sections = [field.name for field in fields(Params)]
    for _ in range(cases):
        content = garbled(draw, text) if draw.random() < 0.3 else mutated(draw, text)
        path.write_text(content, newline="")
        try:
            params = load_params(path)
            problem = None if all(hasattr(params, section) for section in sections) else "incomplete params"
        except GPT2Error as error:
            lines = str(error).split("\n")
            is_list = len(lines) == 1 or f"has {len(lines) - 1} problems:" in lines[0]
            problem = None if error.exit_code == 2 and is_list and len(lines[0]) < 1000 else f"bad message: {error}"
        except Exception as error:
            problem = f"traceback: {type(error).__name__}: {error}"
        result.add(problem and f"{problem}\n{content}")
    return result
