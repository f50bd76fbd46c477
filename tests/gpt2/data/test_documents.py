import hashlib

import pytest

from gpt2.data.documents import hash_of, new_hash, read_documents, record
from gpt2.errors import FileError


@pytest.fixture
def files(tmp_path):
    (tmp_path / "corpus.txt").write_text("onetwo")
    with (tmp_path / "documents.bin").open("wb") as file:
        for end, text in (3, b"one"), (6, b"two"):
            digest = new_hash()
            digest.update(text)
            file.write(record(end, digest))
    return tmp_path / "documents.bin", tmp_path / "corpus.txt"


def test_records_are_read_as_they_were_written(files):
    documents = read_documents(*files)
    assert documents["end"].tolist() == [3, 6]
    expected = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") for text in (b"one", b"two")]
    assert documents["hash"].tolist() == expected
    assert hash_of(new_hash()) not in expected


def test_records_of_another_corpus_are_refused(files):
    records, corpus = files
    corpus.write_text("onetwo three")
    assert len(read_documents(records)) == 2
    with pytest.raises(FileError, match="which has 12 bytes; run the fetch stage again"):
        read_documents(records, corpus)


@pytest.mark.parametrize("size", [0, 15, 31])
def test_damaged_records_are_refused(files, size):
    records, corpus = files
    records.write_bytes(records.read_bytes()[:size])
    with pytest.raises(FileError, match="run the fetch stage again"):
        read_documents(records, corpus)


def test_missing_files_are_refused(files):
    records, corpus = files
    corpus.unlink()
    with pytest.raises(FileError, match="run the fetch stage again"):
        read_documents(records, corpus)
