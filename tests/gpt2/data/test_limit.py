import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2 import tokenizer
from gpt2.data.limit import Limit, is_limit, limited, parse_limit

DOCUMENTS = [("one ", "two"), ("drei é漢字",), ("four five six",)]


def first(count, unit, documents=DOCUMENTS):
    return ["".join(document) for document in limited(iter(documents), Limit(count, unit))]


@pytest.mark.parametrize(
    ("text", "count", "unit"),
    [
        ("1000 documents", 1000, "documents"),
        ("1 document", 1, "documents"),
        ("2k documents", 2000, "documents"),
        ("500 MB", 500_000_000, "bytes"),
        ("1.5GB", 1_500_000_000, "bytes"),
        ("10 bytes", 10, "bytes"),
        ("3 kB", 3000, "bytes"),
        ("10M tokens", 10_000_000, "tokens"),
        ("10B tokens", 10_000_000_000, "tokens"),
        ("1,000_000 Tokens", 1_000_000, "tokens"),
    ],
)
def test_limits_are_parsed(text, count, unit):
    assert parse_limit(text) == Limit(count, unit)


@pytest.mark.parametrize(
    "text",
    ["", "10", "tokens", "10 M", "-5 MB", "0 tokens", "0.1 bytes", "5 MiB", "10 words", "1e3 tokens", "1 T tokens"],
)
def test_other_texts_are_no_limits(text):
    assert not is_limit(text)
    with pytest.raises(ValueError, match=r"expected|less than 1"):
        parse_limit(text)


def test_no_limit_takes_all():
    assert is_limit(None)
    assert list(limited(iter(DOCUMENTS), None)) == DOCUMENTS


def test_documents_are_counted():
    assert first(2, "documents") == ["one two", "drei é漢字"]
    assert len(first(99, "documents")) == 3


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, ["o"]),
        (7, ["one two"]),
        (8, ["one two", "d"]),
        (13, ["one two", "drei "]),  # half of é is left out
        (14, ["one two", "drei é"]),
        (16, ["one two", "drei é"]),
        (1000, ["one two", "drei é漢字", "four five six"]),
    ],
)
def test_bytes_are_cut_at_a_character(count, expected):
    assert first(count, "bytes") == expected


def test_nothing_is_read_beyond_the_limit():
    def endless():
        while True:
            yield ("some words ",)

    assert first(12, "bytes", endless()) == ["some words ", "s"]
    assert first(11, "bytes", endless()) == ["some words "]
    assert len("".join(first(1000, "tokens", endless()))) > 1000


@given(st.lists(st.lists(st.text(max_size=20), max_size=4), max_size=5), st.integers(1, 40))
def test_tokens_are_those_of_the_documents(documents, count):
    whole = ["".join(document) for document in documents]
    found = first(count, "tokens", documents)
    ids = [tokenizer.encode(text) for text in whole]
    taken = 0
    for number, text in enumerate(found):
        assert whole[number].startswith(text)
        expected = ids[number][: count - taken]
        kept = b"".join(map(tokenizer.token_bytes, expected)).decode(errors="ignore")
        assert text == kept
        taken += len(expected)
    assert taken == min(count, sum(map(len, ids)))
