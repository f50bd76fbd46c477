import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2 import tokenizer
from gpt2.data import token_files
from gpt2.data.token_files import open_tokens, write_tokens
from gpt2.errors import FileError, UserError


@given(st.text(alphabet=st.sampled_from(list("ab'1 s\n\t\r\x1c\u00a0é🙂.")), max_size=80), st.integers(1, 9))
def test_chunks_have_the_tokens_of_the_whole_text(text, size):
    chunks = (text[i : i + size] for i in range(0, len(text), size))
    found = [int(token) for part in token_files.encode_chunks(chunks) for token in part]
    assert found == tokenizer.encode(text)


def test_a_text_without_white_space_is_unchanged(monkeypatch):
    monkeypatch.setattr(token_files, "MAX_PENDING_CHARACTERS", 100)
    text = "a" * 1000
    parts = list(token_files.encode_chunks(text[i : i + 10] for i in range(0, 1000, 10)))
    assert len(parts) == 10  # it did not wait for the end
    assert tokenizer.decode(int(t) for part in parts for t in part) == text


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_the_validation_split_is_the_last_tenth_of_the_characters(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(token_files, "CHUNK_CHARACTERS", chunk)
    text = "Über den Wolken.\n\nUnd darunter 漢字!\n" * 41 + "The end"
    (tmp_path / "corpus.txt").write_text(text)
    meta = write_tokens(tmp_path / "corpus.txt", tmp_path / "tokens", 0.1)
    boundary = int(len(text) * 0.9)
    for split, part in ("train", text[:boundary]), ("val", text[boundary:]):
        tokens = open_tokens(tmp_path / "tokens", split)
        assert tokens.tolist() == tokenizer.encode(part)
        assert tokens.dtype == np.dtype("<u2")
        assert meta["splits"][split]["bytes"] == len(part.encode())
        assert meta["splits"][split]["tokens"] == len(tokens)
    assert json.loads((tmp_path / "tokens/meta.json").read_text()) == meta


def test_a_large_corpus_takes_little_memory(tmp_path):
    corpus = tmp_path / "corpus.txt"
    with corpus.open("w") as file:
        for number in range(200_000):
            file.write(f"Line {number} of a text that is much larger than a chunk.\n")
    tokenizer.encoding()
    tracemalloc.start()
    write_tokens(corpus, tmp_path / "tokens", 0.1)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tokens = sum(len(open_tokens(tmp_path / "tokens", split)) for split in ("train", "val"))
    # a list of all the tokens takes eight bytes for each at least
    assert corpus.stat().st_size > 10e6
    assert peak_bytes < 0.7 * 8 * tokens, (peak_bytes, tokens)


def test_a_corpus_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "corpus.txt").write_text("Hello world")
    with pytest.raises(UserError, match="the val split has 2 of the corpus's 11 characters"):
        write_tokens(tmp_path / "corpus.txt", tmp_path / "tokens", 0.1)


def test_truncated_token_files_are_detected(tokens):
    path = tokens / "train.bin"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FileError, match=r"train\.bin has \d+ tokens, not \d+; run the tokenize stage again"):
        open_tokens(tokens, "train")
    path.write_bytes(b"")
    with pytest.raises(FileError, match=r"cannot read .*train\.bin"):
        open_tokens(tokens, "train")
    (tokens / "meta.json").write_text("{")
    with pytest.raises(FileError, match=r"no readable meta\.json"):
        open_tokens(tokens, "val")
