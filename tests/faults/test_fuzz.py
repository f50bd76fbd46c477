"""Fuzzing of corpora and params, in this process."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import tokenizer
from gpt2.data import corpus, token_files
from gpt2.data.sources import text as source_text
from gpt2.errors import FileError, UserError
from tests.conftest import tokenize, write_documents
from tests.faults.fuzz import corpora, params_files, source_files


def test_fuzzed_corpora_are_unchanged_or_refused(tmp_path):
    corpora(tmp_path, 300).check(at_least=300)


def test_fuzzed_files_of_rows_are_read_or_refused(tmp_path):
    source_files(tmp_path, 400).check(at_least=400)


def test_wrong_params_are_refused_in_one_message(tmp_path):
    params_files(tmp_path, 500).check(at_least=500)


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_decode_inverts_encode_for_strange_texts(text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_end_of_text_in_a_corpus_is_encoded_as_text():
    assert tokenizer.END_OF_TEXT not in tokenizer.encode("<|endoftext|>")


def write(tmp_path, source):
    corpus.write_corpus(
        str(source), tmp_path / "corpus.txt", tmp_path / "documents.bin", downloads=tmp_path, roots=[tmp_path]
    )


@pytest.mark.parametrize("text", ["a" * 1_000_000, "word " * 1_000_000, " " * 1_000_000 + "x"])
def test_a_long_line_is_tokenized_in_chunks(tmp_path, text):
    write_documents(tmp_path, [text])
    index = tokenize(tmp_path)
    assert sum(split["bytes"] for split in index["splits"].values()) == len(text)


def test_sources_that_are_no_files_are_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    for name in ("a", "pipe", "empty", "nowhere", "~nobody-is-called-so/x.txt", "nul\0byte", "/dev/zero", "x" * 5000):
        with pytest.raises((UserError, FileError, OSError)) as raised:
            write(tmp_path, tmp_path / name if name[0] not in "~/" else name)
        assert "\n" not in str(raised.value)


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    source = tmp_path / "mine.txt"
    source.write_text("Some words. " * 1000)
    monkeypatch.setattr(source_text, "CHUNK_BYTES", 1000)

    def write_too(_):
        with source.open("a") as file:
            file.write("more" if source.stat().st_size < 20_000 else "")

    with pytest.raises(UserError, match="changed while it was read"):
        corpus.write_corpus(
            str(source),
            tmp_path / "corpus.txt",
            tmp_path / "documents.bin",
            downloads=tmp_path,
            roots=[tmp_path],
            progress=write_too,
        )
    assert not (tmp_path / "corpus.txt").exists()


def test_partial_token_files_are_refused(tokens):
    path = tokens / "train-00000.bin"
    whole = path.read_bytes()
    for damaged in (whole[:-2], whole[: len(whole) // 2], b"", whole[:100] + b"\1" + whole[101:], whole + b"\0\0"):
        path.write_bytes(damaged)
        with pytest.raises(FileError, match="run the tokenize stage again"):
            token_files.open_tokens(tokens, "train")
    path.write_bytes(whole)
    for index in ("", "{}", "[]", '{"splits": {"train": 3}}', '{"splits": null}'):
        (tokens / "index.json").write_text(index)
        with pytest.raises(FileError, match="run the tokenize stage again"):
            token_files.open_tokens(tokens, "train")
