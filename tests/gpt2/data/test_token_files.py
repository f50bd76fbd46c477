import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.data import token_files
from gpt2.data.token_files import TokenFiles, open_tokens
from gpt2.errors import FileError
from tests.conftest import our_text, tokenize, write_documents


@pytest.fixture
def shards(tmp_path, text):
    """A folder whose training split has several shards of 1,000 tokens."""
    write_documents(tmp_path, [text])
    index = tokenize(tmp_path, shard_tokens=1000)
    assert len(index["splits"]["train"]["shards"]) > 3
    return tmp_path / "tokens"


def test_a_shard_is_readable_by_numpy_alone(shards):
    index = json.loads((shards / "index.json").read_text())
    parts = [np.memmap(shards / shard["file"], "<u2") for shard in index["splits"]["train"]["shards"]]
    assert np.concatenate(parts).tolist() == open_tokens(shards, "train")[:].tolist()


def test_slices_cross_the_borders_of_shards(shards):
    tokens = open_tokens(shards, "train")
    whole = tokens[:]
    assert len(whole) == len(tokens)
    for part in (slice(990, 1010), slice(999, 3001), slice(1000, 2000), slice(-5, None), slice(5, 5), slice(9, 3)):
        assert np.array_equal(tokens[part], whole[part])
        assert tokens[part].dtype == np.dtype("<u2")
    with pytest.raises(ValueError, match="step"):
        tokens[::2]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 30), st.integers(0, 30))
def test_any_slice_of_any_shards_is_that_of_the_whole(tmp_path_factory, lengths, start, stop):
    folder = tmp_path_factory.mktemp("shards")
    whole = np.arange(sum(lengths), dtype="<u2")
    paths = [folder / str(number) for number in range(len(lengths))]
    for path, part in zip(paths, np.split(whole, np.cumsum(lengths)[:-1]), strict=True):
        part.tofile(path)
    assert TokenFiles(paths, lengths, [""] * len(paths))[start:stop].tolist() == whole[start:stop].tolist()


def test_truncated_token_files_are_detected(tokens):
    path = tokens / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FileError, match=r"train-00000\.bin has \d+ tokens, not \d+; run the tokenize stage again"):
        open_tokens(tokens, "train")
    path.unlink()
    with pytest.raises(FileError, match=r"cannot read .*train-00000\.bin"):
        open_tokens(tokens, "train")
    (tokens / "index.json").write_text("{")
    with pytest.raises(FileError, match=r"no readable index\.json"):
        open_tokens(tokens, "val")


def test_an_index_cannot_name_other_files(tokens):
    index = (tokens / "index.json").read_text()
    (tokens / "index.json").write_text(index.replace("train-00000.bin", "../corpus.txt"))
    with pytest.raises(FileError, match=r"no readable index\.json"):
        open_tokens(tokens, "train")


def damage(path):
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def test_a_damaged_shard_of_a_small_split_is_named_at_once(shards):
    damage(shards / "train-00002.bin")
    with pytest.raises(FileError, match=r"train-00002\.bin is damaged: .*; run the tokenize stage again"):
        open_tokens(shards, "train")
    open_tokens(shards, "val")


def test_a_damaged_shard_of_a_large_split_is_named_at_a_later_read(shards, monkeypatch):
    monkeypatch.setattr(token_files, "VERIFIED_AT_ONCE_BYTES", 100)
    damage(shards / "train-00002.bin")
    tokens = open_tokens(shards, "train", part=1, parts=2)
    tokens.finish_verification()
    assert len(tokens[:10]) == 10  # the others verify that one
    tokens.verify_in_background(0, 2)
    with pytest.raises(FileError, match=r"train-00002\.bin is damaged"):
        tokens.finish_verification()
    with pytest.raises(FileError, match=r"train-00002\.bin is damaged"):
        tokens[:10]


def test_a_file_that_becomes_shorter_is_noticed(shards):
    tokens = open_tokens(shards, "train")
    (shards / "train-00001.bin").write_bytes(b"")
    with pytest.raises(FileError, match=r"train-00001\.bin became shorter"):
        tokens[900:1100]


def test_the_sum_of_a_split_changes_with_its_tokens(tmp_path):
    sums = set()
    for seed in (1, 1, 2):
        write_documents(tmp_path, [our_text(50, seed)])
        index = tokenize(tmp_path)
        sums.add(token_files.split_sha256(index, "train"))
    assert len(sums) == 2
