import random
import signal
import sys
import tracemalloc
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import tokenizer
from gpt2.config import TokenizeConfig
from gpt2.data.documents import read_documents
from gpt2.data.token_files import open_tokens
from gpt2.data.tokenizing import blocks
from gpt2.data.tokenizing import shards as shards_module
from gpt2.data.tokenizing.blocks import BlockEncoder, Job, encoder, safe_cut
from gpt2.data.tokenizing.splits import split_documents
from gpt2.errors import BusyError, FileError, Interrupted, OutOfMemoryError, UserError
from gpt2.files import file_lock
from gpt2.progress import no_progress
from tests.conftest import our_text, tokenize, write_documents
from tests.faults.tokenizing import killed_tokenizing, sums_of

STRANGE = st.text(alphabet=st.sampled_from(list("ab'1 s\n\t\r\x1c\u00a0é🙂.")), max_size=60)


def expected_tokens(documents):
    """Each document encoded on its own, with <|endoftext|> between them."""
    parts = [[tokenizer.END_OF_TEXT, *tokenizer.encode(document)] for document in documents if document]
    return [token for part in parts for token in part][1:]


@given(st.lists(STRANGE, min_size=1, max_size=6), st.integers(1, 30))
@settings(max_examples=300)
def test_blocks_never_change_the_tokens(tmp_path_factory, documents, block_bytes):
    folder = tmp_path_factory.mktemp("blocks")
    documents = [*documents, "end"]
    write_documents(folder, documents)
    records = read_documents(folder / "documents.bin")
    config = TokenizeConfig(1e-18, "documents", False)  # all is training
    with pytest.raises(UserError):
        split_documents(folder / "corpus.txt", records, config)
    size = int(records["end"][-1])
    split = splits_of_all(records, size)
    encode = BlockEncoder(Job(folder / "corpus.txt", folder / "documents.bin", {"train": split}, block_bytes))
    numbers = range(-(-size // block_bytes))
    starts = [encode.start(number) for number in [*numbers, len(numbers)]]
    assert starts == sorted(starts)
    assert (starts[0], starts[-1]) == (0, size)
    found = [encode.encode("train", number) for number in numbers]
    encode.close()
    assert np.concatenate([block.tokens for block in found]).tolist() == expected_tokens(documents)
    assert sum(block.bytes for block in found) == size


def splits_of_all(records, size):
    from gpt2.data.tokenizing.splits import HASHES, Split

    return Split(0, size, 0, HASHES - 1, np.empty(0, dtype=np.int64)).counted(records)


def test_a_cut_is_before_a_run_of_white_space():
    assert safe_cut(b"one  two", 1) == 3
    assert safe_cut(b"one  two", 4) is None
    assert safe_cut("a\u00a0 b".encode(), 1) is None  # a no-break space is white space too
    assert safe_cut("aé b".encode()[2:], 1) == 1  # the data begins within a character


def test_a_run_without_white_space_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "SEARCH_BYTES", 10)
    text = "é漢🙂" * 200
    write_documents(tmp_path, [text])
    tokenize(tmp_path, block_bytes=64)
    tokens = [token for split in ("train", "val") for token in open_tokens(tmp_path / "tokens", split)[:].tolist()]
    assert tokenizer.decode(tokens) == text


def write_many(folder, documents=60):
    draw = random.Random(3)
    write_documents(folder, [our_text(draw.randrange(1, 60), seed) for seed in range(documents)])


@pytest.mark.parametrize("split", ["tail", "documents"])
def test_bytes_and_shards_do_not_depend_on_processes_or_blocks(tmp_path, split):
    write_many(tmp_path)
    options = {"split": split, "shard_tokens": 3000}
    tokenize(tmp_path, 0.2, **options)
    expected = sums_of(tmp_path)
    assert len(expected) > 5
    for changes in ({"processes": 2}, {"processes": 3, "block_bytes": 777}, {"block_bytes": 10_000}):
        tokenize(tmp_path, 0.2, **options, **{"block_bytes": 5000, **changes})
        assert sums_of(tmp_path) == expected
    assert not (tmp_path / "tokens.partial").exists()
    # the shards of a longer text go away
    tokenize(tmp_path, 0.2, split=split)
    assert sorted(sums_of(tmp_path)) == ["index.json", "train-00000.bin", "val-00000.bin"]


def test_shards_are_full_but_for_the_last(tmp_path):
    write_documents(tmp_path, ["a" + " a" * 499, "b" + " b" * 10])
    index = tokenize(tmp_path, 0.0205, shard_tokens=250, block_bytes=100)
    assert [shard["tokens"] for shard in index["splits"]["train"]["shards"]] == [250, 250]
    assert [shard["tokens"] for shard in index["splits"]["val"]["shards"]] == [11]


def test_an_interrupted_run_goes_on_after_the_last_finished_shard(tmp_path):
    write_many(tmp_path)
    options = {"shard_tokens": 2000, "block_bytes": 4000}
    tokenize(tmp_path, **options)
    expected = sums_of(tmp_path)
    size = (tmp_path / "corpus.txt").stat().st_size
    done, skipped = 0, []

    def stop_at(limit):
        def progress(count):
            nonlocal done
            done += count
            if done > limit:
                raise Interrupted("stop", signal.SIGTERM)

        return progress

    for limit in (size // 3, 2 * size // 3):
        with pytest.raises(Interrupted):
            tokenize(tmp_path, **options, progress=stop_at(limit), resumed=skipped.append)
        assert sorted(path.name for path in (tmp_path / "tokens.partial").iterdir())[0] != "index.json"
        done = 0
    counts = []
    tokenize(tmp_path, **options, progress=counts.append, resumed=skipped.append)
    assert sums_of(tmp_path) == expected
    assert len(skipped) == 2
    assert sum(counts) == size - skipped[-1]
    assert skipped[-1] > size // 3


def test_unfinished_work_on_another_text_is_not_used(tmp_path):
    options = {"shard_tokens": 2000, "block_bytes": 4000}
    write_many(tmp_path)

    def stop(count):
        if count and (tmp_path / "tokens.partial/progress.json").exists():
            raise Interrupted("stop", signal.SIGTERM)

    with pytest.raises(Interrupted):
        tokenize(tmp_path, **options, progress=stop)
    write_many(tmp_path, 50)
    with pytest.raises(Interrupted):
        tokenize(tmp_path, **options, progress=stop)
    tokenize(tmp_path, **options, resumed=lambda count: None)
    found = sums_of(tmp_path)
    tokenize(tmp_path, **options)
    assert sums_of(tmp_path) == found


def test_a_full_disk_keeps_the_finished_shards(tmp_path, monkeypatch):
    write_many(tmp_path)
    real, calls = shards_module.atomic_write, []

    def fail(path):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr(shards_module, "atomic_write", fail)
    with pytest.raises(OSError, match="No space"):
        tokenize(tmp_path, shard_tokens=2000)
    assert (tmp_path / "tokens.partial/train-00001.bin").exists()
    assert not (tmp_path / "tokens").exists()


def test_a_disk_that_will_be_too_small_is_told_before_the_work(tmp_path, monkeypatch):
    write_many(tmp_path)
    monkeypatch.setattr(shards_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(FileError, match=r"the tokens need about 0\.0 GB, and the disk of .* has 0\.0 GB left"):
        tokenize(tmp_path)


def test_without_hard_links_the_shards_are_copied(tmp_path, monkeypatch):
    write_many(tmp_path)
    tokenize(tmp_path)
    expected = sums_of(tmp_path)

    def fail(*_):
        raise OSError("no links here")

    monkeypatch.setattr(shards_module.os, "link", fail)
    tokenize(tmp_path)
    assert sums_of(tmp_path) == expected


def test_two_at_once_are_refused(tmp_path):
    write_many(tmp_path)
    with file_lock(tmp_path / "tokens.partial/lock"), pytest.raises(BusyError):
        tokenize(tmp_path)


def test_a_corpus_that_is_too_short_is_refused(tmp_path):
    write_documents(tmp_path, ["Hello world"])
    with pytest.raises(UserError, match="the val split has 2 of the corpus's 11 bytes"):
        tokenize(tmp_path)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_corpus_that_is_not_utf8_is_refused(tmp_path, processes):
    write_documents(tmp_path, ["Hello world. " * 100])
    (tmp_path / "corpus.txt").write_bytes(b"\xff" + (tmp_path / "corpus.txt").read_bytes()[1:])
    with pytest.raises(UserError, match=r"corpus\.txt is not UTF-8: .*; run the fetch stage again"):
        tokenize(tmp_path, processes=processes, block_bytes=200)


def test_documents_of_another_corpus_are_refused(tmp_path):
    write_documents(tmp_path, ["Hello world. " * 100])
    (tmp_path / "corpus.txt").write_text("Another text")
    with pytest.raises(FileError, match=r"documents\.bin is not of .*; run the fetch stage again"):
        tokenize(tmp_path)


def test_a_large_corpus_takes_little_memory(tmp_path):
    text = "".join(f"Line {number} of a text that is much larger than a block.\n" for number in range(200_000))
    write_documents(tmp_path, [text])
    del text
    tokenizer.encoding()
    tracemalloc.start()
    tokenize(tmp_path, block_bytes=1 << 18)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "corpus.txt").stat().st_size > 10e6
    assert peak_bytes < 12e6, peak_bytes  # a list of the tokens takes twice as much at least


def test_the_number_of_processes_follows_the_blocks():
    assert shards_module.count_processes(1_115_394, 8) == 1
    assert shards_module.count_processes(100_000_000, 8) == 8
    assert shards_module.count_processes(12_000_000, 8) == 3


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path):
    killed_tokenizing(tmp_path, 2).check(at_least=3)


@pytest.mark.slow
def test_killed_many_times_it_ends_with_the_same_bytes(tmp_path):
    killed_tokenizing(tmp_path, 10, seed=1).check(at_least=11)


def workers():
    """The processes of the pool."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "multiprocessing.spawn" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_a_killed_worker_is_told_in_one_line_and_finished_shards_stay(tmp_path):
    write_many(tmp_path)

    def progress(count):
        if (tmp_path / "tokens.partial/train-00001.bin").exists():
            for worker in workers():
                worker.kill()

    with pytest.raises(OutOfMemoryError, match="was killed, perhaps because memory is short"):
        tokenize(tmp_path, processes=2, shard_tokens=2000, block_bytes=2000, progress=progress)
    assert (tmp_path / "tokens.partial/train-00000.bin").exists()


def test_workers_do_not_import_torch_and_ignore_interrupts(tmp_path):
    write_many(tmp_path)
    records = read_documents(tmp_path / "documents.bin")
    splits, _ = split_documents(tmp_path / "corpus.txt", records, TokenizeConfig(0.1, "tail", False))
    job = Job(tmp_path / "corpus.txt", tmp_path / "documents.bin", splits, 2000)
    with encoder(job, 2) as encode:
        next(encode.blocks("train", range(3), no_progress))
        started = workers()
        assert started
        for worker in started:
            worker.send_signal(signal.SIGINT)
            if sys.platform == "linux":
                assert not [each.path for each in worker.memory_maps() if "libtorch" in each.path]
        assert len(list(encode.blocks("train", range(3), no_progress))) == 3
    assert psutil.wait_procs(started, timeout=5)[1] == []
