"""The limit of a corpus: its first documents, bytes or tokens."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from gpt2.data.sources.text import Document

FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
PATTERN = re.compile(
    r"(?P<number>[\d,_]*\d(?:\.\d+)?)\s*"
    r"(?:(?P<factor>[kmb]?)\s*(?P<unit>documents?|tokens?)|(?P<prefix>[kmgt]?)(?:bytes|b))",
    re.IGNORECASE,
)
MAX_PENDING_CHARACTERS = 1 << 20
EXPECTED_LIMIT = "null or a text such as '1000 documents', '500 MB' or '10M tokens'"


@dataclass(frozen=True)
class Limit:
    """The first `count` of "documents", "bytes" (of UTF-8 text) or "tokens"."""

    count: int
    unit: str


def parse_limit(text: str) -> Limit:
    """A limit as written in params.yaml; k, M, G and B (billion) are powers of 1000.

    Raises ValueError if it is not of that form, or less than 1.
    """
    match = PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r}; expected {EXPECTED_LIMIT}")
    factor = FACTORS[(match["factor"] or match["prefix"] or "").lower()]
    count = int(float(match["number"].replace(",", "").replace("_", "")) * factor)
    if count < 1:
        raise ValueError(f"{text!r} is less than 1")
    return Limit(count, f"{match['unit'].lower().rstrip('s')}s" if match["unit"] else "bytes")


def is_limit(text: str | None) -> bool:
    """Whether a value is None or can be parsed."""
    try:
        return text is None or bool(parse_limit(text))
    except ValueError:
        return False


def limited(documents: Iterator[Document], limit: Limit | None) -> Iterator[Document]:
    """The first documents, up to a limit. The last one may be cut, between two characters, and be empty.

    Tokens are those of each document on its own; no end-of-text token is counted.
    """
    if limit is None:
        return documents
    if limit.unit == "documents":
        return islice(documents, limit.count)
    return _first(documents, limit)


def _first(documents: Iterator[Document], limit: Limit) -> Iterator[Document]:
    left = limit.count
    pieces_of, take = (_pieces, _take_tokens) if limit.unit == "tokens" else (iter, _take_bytes)

    def cut(document: Document) -> Iterator[str]:
        nonlocal left
        for piece in pieces_of(document):
            text, taken = take(piece, left)
            left -= taken
            yield text
            if left == 0:
                return

    for document in documents:
        yield cut(document)
        if left == 0:
            return


def _take_bytes(text: str, count: int) -> tuple[str, int]:
    """The first `count` bytes of a text without half a character at the end, and the number of bytes taken."""
    data = text.encode()
    return (text, len(data)) if len(data) <= count else (data[:count].decode(errors="ignore"), count)


def _take_tokens(text: str, count: int) -> tuple[str, int]:
    """The text of its first `count` tokens without half a character at the end, and the number of tokens taken."""
    from gpt2 import tokenizer

    ids = tokenizer.encode_array(text)
    if len(ids) <= count:
        return text, len(ids)
    return b"".join(map(tokenizer.token_bytes, ids[:count].tolist())).decode(errors="ignore"), count


def _pieces(document: Document) -> Iterator[str]:
    """A document in pieces with the same tokens; a run of a million characters without white space may be cut."""
    from gpt2 import tokenizer

    pending = ""
    for chunk in document:
        pending += chunk
        cut = tokenizer.last_cut(pending) or (len(pending) if len(pending) >= MAX_PENDING_CHARACTERS else 0)
        if cut:
            yield pending[:cut]
            pending = pending[cut:]
    if pending:
        yield pending
