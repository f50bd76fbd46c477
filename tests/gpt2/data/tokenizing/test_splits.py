import numpy as np
import pytest

from gpt2 import tokenizer
from gpt2.data.documents import read_documents
from gpt2.data.token_files import open_tokens
from gpt2.data.tokenizing import splits
from gpt2.errors import UserError
from tests.conftest import our_text, tokenize, write_documents

DOCUMENTS = [our_text(3, seed) + "é漢" for seed in range(200)]


def texts_of(folder, split):
    """The documents of a split, from its tokens."""
    tokens = open_tokens(folder / "tokens", split)[:]
    borders = np.flatnonzero(tokens == tokenizer.END_OF_TEXT)
    parts = np.split(tokens, borders)
    return [tokenizer.decode(part[number > 0 :].tolist()) for number, part in enumerate(parts)]


def test_end_of_text_stands_between_documents_and_nowhere_else(tmp_path):
    documents = ["One <|endoftext|> two.", " three", "\n\nfour", "five"] + ["and so on"] * 10
    write_documents(tmp_path, documents)
    index = tokenize(tmp_path, 0.4)
    parts = texts_of(tmp_path, "train"), texts_of(tmp_path, "val")
    assert "".join(parts[0] + parts[1]) == "".join(documents)
    assert parts[0][:4] == documents[:4]
    assert parts[1][1:] == documents[-len(parts[1]) + 1 :]
    assert [index["splits"][name]["documents"] for name in ("train", "val")] == [len(part) for part in parts]


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_the_tail_is_the_last_tenth_of_the_characters(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(splits, "CHUNK_BYTES", chunk)
    text = "Über den Wolken.\n\nUnd darunter 漢字!\n" * 41 + "The end"
    write_documents(tmp_path, [text])
    index = tokenize(tmp_path)
    boundary = int(len(text) * 0.9)
    for split, part in ("train", text[:boundary]), ("val", text[boundary:]):
        tokens = open_tokens(tmp_path / "tokens", split)
        assert tokens[:].tolist() == tokenizer.encode(part)
        assert index["splits"][split]["bytes"] == len(part.encode())
        assert index["splits"][split]["tokens"] == len(tokens)
        assert index["splits"][split]["documents"] == 1


def test_a_tail_that_begins_with_a_document_has_no_end_of_text_before_it(tmp_path):
    write_documents(tmp_path, ["a" * 90, "b" * 10])
    tokenize(tmp_path)
    assert texts_of(tmp_path, "val") == ["b" * 10]
    assert texts_of(tmp_path, "train") == ["a" * 90]


def test_documents_are_on_one_side_each(tmp_path):
    write_documents(tmp_path, DOCUMENTS)
    index = tokenize(tmp_path, 0.2, split="documents")
    train, val = texts_of(tmp_path, "train"), texts_of(tmp_path, "val")
    assert sorted(train + val) == sorted(DOCUMENTS)
    assert train == [each for each in DOCUMENTS if each in set(train)]  # in order
    assert 20 <= len(val) <= 60  # 40 are expected
    assert index["splits"]["val"]["documents"] == len(val)
    assert index["splits"]["val"]["bytes"] == sum(len(each.encode()) for each in val)


def test_more_documents_never_move_one_to_the_other_side(tmp_path):
    write_documents(tmp_path, DOCUMENTS[50:100])
    tokenize(tmp_path, 0.2, split="documents")
    before = set(texts_of(tmp_path, "val"))
    write_documents(tmp_path, DOCUMENTS)
    tokenize(tmp_path, 0.2, split="documents")
    assert before == set(texts_of(tmp_path, "val")) & set(DOCUMENTS[50:100])


def test_a_split_with_too_few_documents_is_refused(tmp_path):
    write_documents(tmp_path, ["Only one document."])
    with pytest.raises(UserError, match=r"the \w+ split has none of the corpus's 1 documents; use a longer text"):
        tokenize(tmp_path, split="documents")


def test_duplicates_across_the_splits_are_counted_and_removed(tmp_path):
    documents = [f"Document number {number}. " for number in range(20)]
    documents[5] = documents[2]  # within training
    documents[18] = documents[7]  # across
    documents[19] = documents[7]
    write_documents(tmp_path, documents)
    assert tokenize(tmp_path, 0.2)["duplicates"] == {"across": 2, "removed": 0}
    index = tokenize(tmp_path, 0.2, deduplicate=True)
    assert index["duplicates"] == {"across": 0, "removed": 3}
    kept = "".join(texts_of(tmp_path, "train") + texts_of(tmp_path, "val"))
    assert kept == "".join(dict.fromkeys(documents))
    assert [index["splits"][name]["documents"] for name in ("train", "val")] == [15, 2]


def test_identical_documents_are_on_the_same_side_of_a_split_by_documents(tmp_path):
    write_documents(tmp_path, DOCUMENTS[:50] * 2)
    index = tokenize(tmp_path, 0.3, split="documents")
    assert index["duplicates"] == {"across": 0, "removed": 0}
    assert tokenize(tmp_path, 0.3, split="documents", deduplicate=True)["duplicates"]["removed"] == 50


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_duplicates_are_found_range_by_range(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(splits, "CHUNK_DOCUMENTS", chunk)  # 3: nine ranges of hashes
    documents = [*DOCUMENTS[:60], "", *DOCUMENTS[30:70], ""]
    write_documents(tmp_path, documents)
    later, across = splits.find_duplicates(read_documents(tmp_path / "documents.bin"), first_val=70)
    assert later.tolist() == list(range(61, 91))
    assert across == 21


def test_empty_documents_are_left_out(tmp_path):
    write_documents(tmp_path, ["", "First. ", "", "Second one here. ", ""])
    tokenize(tmp_path)
    assert "".join(texts_of(tmp_path, "train") + texts_of(tmp_path, "val")) == "First. Second one here. "
    assert len(texts_of(tmp_path, "train")) == 2
