import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from gpt2.data import sampler as sampler_module
from gpt2.data.sampler import Sampler, spread_windows, windows
from gpt2.errors import FileError, UserError
from tests.conftest import ROOT, TINY_TRAIN


def sampler(num_tokens=1000, batch_size=4, gradient_accumulation_steps=2, seed=5):
    config = replace(
        TINY_TRAIN,
        sequence_length=10,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        seed=seed,
    )
    return Sampler(np.arange(num_tokens, dtype=np.uint16), config)


def test_targets_follow_their_inputs():
    inputs, targets = sampler().batch(3, 1)
    assert inputs.shape == targets.shape == (4, 10)
    assert inputs.dtype == np.int64
    assert (targets == inputs + 1).all()


def test_batches_are_a_pure_function_of_seed_and_step():
    one, other = sampler(), sampler()
    later = [other.batch(step, 0)[0] for step in (40, 3, 17)]
    for step, expected in zip((3, 17, 40), (later[1], later[2], later[0]), strict=True):
        assert np.array_equal(one.batch(step, 0)[0], expected)
    assert not np.array_equal(sampler(seed=6).batch(3, 0)[0], later[1])


def test_an_epoch_visits_each_window_once():
    draws = sampler(num_tokens=411, batch_size=4, gradient_accumulation_steps=1)
    assert draws.num_windows == 40
    orders = [[int(row[0]) for step in range(10) for row in draws.batch(first + step, 0)[0]] for first in (0, 10)]
    for starts in orders:
        assert sorted(starts) == list(range(min(starts), min(starts) + 400, 10))
        assert 0 <= min(starts) <= 10
    first, second = ([(start - min(starts)) for start in starts] for starts in orders)
    assert first != second


def test_accumulation_sees_the_same_sequences_as_a_large_batch():
    small, large = (
        sampler(batch_size=4, gradient_accumulation_steps=2),
        sampler(batch_size=8, gradient_accumulation_steps=1),
    )
    for step in (0, 30):
        parts = [small.batch(step, micro_step)[0] for micro_step in (0, 1)]
        assert np.array_equal(np.concatenate(parts), large.batch(step, 0)[0])


def test_fewer_tokens_than_a_sequence_are_refused():
    with pytest.raises(
        UserError, match=r"the train split has 10 tokens and a sequence needs 11; .*smaller train\.sequence_length"
    ):
        sampler(num_tokens=10)


@pytest.mark.parametrize("num_tokens", [2, 10, 11, 12, 95, 101])
def test_windows_have_each_token_but_the_first_as_a_target_once(num_tokens):
    tokens = np.arange(num_tokens, dtype=np.uint16)
    batches = list(windows(tokens, sequence_length=10, batch_size=3))
    assert [int(t) for _, targets in batches for t in targets.flatten()] == list(range(1, num_tokens))
    assert all((targets == inputs + 1).all() and inputs.shape[0] <= 3 for inputs, targets in batches)


def test_a_split_of_one_window_is_enough():
    inputs, targets = sampler(num_tokens=11, batch_size=2, gradient_accumulation_steps=1).batch(0, 0)
    assert inputs.tolist() == 2 * [list(range(10))]
    assert targets.tolist() == 2 * [list(range(1, 11))]


@pytest.mark.parametrize("num_tokens", [11, 12, 19, 20, 21, 29, 30, 31, 95])
def test_every_token_of_a_short_split_is_read_in_some_epoch(num_tokens):
    draws = sampler(num_tokens=num_tokens, batch_size=1, gradient_accumulation_steps=1)
    batches = [draws.batch(step, 0) for step in range(200 * draws.num_windows)]
    assert {int(token) for inputs, _ in batches for token in inputs.flat} == set(range(num_tokens - 1))
    assert {int(token) for _, targets in batches for token in targets.flat} == set(range(1, num_tokens))


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_run_resumes_in_any_epoch(epoch):
    whole = sampler(num_tokens=411, gradient_accumulation_steps=1)  # ten batches in an epoch
    batches = [whole.batch(step, 0)[0] for step in range(30)]
    resumed = sampler(num_tokens=411, gradient_accumulation_steps=1)
    assert np.array_equal(resumed.batch(10 * epoch, 0)[0], batches[10 * epoch])


@pytest.mark.parametrize("num_tokens", [411, 416])
def test_a_token_has_another_position_in_each_epoch(num_tokens):
    draws = sampler(num_tokens=num_tokens, gradient_accumulation_steps=1)  # 40 windows in an epoch
    offsets = {int(start) % 10 for epoch in range(80) for start in draws.batch(10 * epoch, 0)[0][:, 0]}
    assert offsets == set(range(10))


@pytest.mark.parametrize("num_tokens", [11, 12, 61, 65])
def test_windows_are_never_empty_and_hold_token_ids(num_tokens):
    for inputs, targets in windows(np.arange(num_tokens, dtype=np.uint16), sequence_length=10, batch_size=3):
        assert inputs.size == targets.size > 0
        assert inputs.dtype == targets.dtype == np.int64  # what an embedding takes


def batch_of_one_order(tokens, config, step, micro_step):
    """A batch of all windows in one order."""
    length = config.sequence_length
    count = len(tokens) // length - 1
    first = (step * config.gradient_accumulation_steps + micro_step) * config.batch_size
    rows = []
    for index in range(first, first + config.batch_size):
        epoch, position = divmod(index, count)
        generator = np.random.default_rng([config.seed, epoch])
        offset = generator.integers(len(tokens) - 1 - count * length + 1)
        start = (offset + length * generator.permutation(count))[position]
        rows.append(tokens[start : start + length + 1])
    return np.stack(rows).astype(np.int64)


def test_a_text_of_one_group_has_all_windows_in_one_order():
    draws = sampler(num_tokens=1007)
    config = replace(TINY_TRAIN, sequence_length=10, batch_size=4, gradient_accumulation_steps=2, seed=5)
    for step in (0, 1, 12, 13, 40):
        for micro_step in (0, 1):
            windows = batch_of_one_order(draws.tokens, config, step, micro_step)
            inputs, targets = draws.batch(step, micro_step)
            assert np.array_equal(inputs, windows[:, :-1])
            assert np.array_equal(targets, windows[:, 1:])


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three windows, and groups of four chunks."""
    monkeypatch.setattr(sampler_module, "CHUNK_TOKENS", 35)
    monkeypatch.setattr(sampler_module, "GROUP_CHUNKS", 4)


@pytest.mark.parametrize("num_tokens", [141, 401, 406, 421])
def test_an_epoch_of_groups_visits_each_window_once(small_chunks, num_tokens):
    draws = sampler(num_tokens=num_tokens, batch_size=1, gradient_accumulation_steps=1)
    count = draws.num_windows
    assert draws.num_groups > 1
    orders = []
    for epoch in range(3):
        rows = [draws.batch(step, 0) for step in range(epoch * count, (epoch + 1) * count)]
        assert all((targets == inputs + 1).all() for inputs, targets in rows)
        starts = [int(inputs[0, 0]) for inputs, _ in rows]
        offset = min(starts)
        assert sorted(starts) == list(range(offset, offset + 10 * count, 10))
        orders.append(starts)
    assert orders[0] != orders[1] != orders[2]


def test_a_group_reads_whole_chunks_in_sequence(small_chunks):
    reads = []

    class Tokens:
        def __len__(self):
            return 1001

        def __getitem__(self, part):
            start, stop, _ = part.indices(1001)
            if stop > start:
                reads.append((start, stop))
            return np.arange(start, stop, dtype=np.uint16)

    draws = Sampler(Tokens(), replace(TINY_TRAIN, sequence_length=10, batch_size=1, gradient_accumulation_steps=1))
    draws.batch(0, 0)
    draws._ahead.result()
    assert len(reads) == 2 * 4  # this group and the next one
    assert all(stop - start in (31, 11) for start, stop in reads)
    draws.batch(1, 0)
    assert len(reads) == 8
    offset = draws._epoch.offset
    first = {(int(draws.batch(step, 0)[0][0, 0]) - offset) // 10 for step in range(12)}
    assert len({number // 3 for number in first}) == 4  # of four chunks


def test_batches_of_groups_are_a_pure_function_of_seed_and_step(small_chunks):
    one, other = sampler(num_tokens=1000), sampler(num_tokens=1000)
    later = {step: other.batch(step, 1)[0] for step in (40, 3, 17, 4, 12)}
    for step in sorted(later):
        assert np.array_equal(one.batch(step, 1)[0], later[step])
    assert not np.array_equal(sampler(num_tokens=1000, seed=6).batch(3, 1)[0], later[3])


@pytest.mark.parametrize("processes", [2, 4])
def test_the_order_does_not_depend_on_the_number_of_processes(small_chunks, processes):
    config = replace(TINY_TRAIN, sequence_length=10, batch_size=4, gradient_accumulation_steps=2)
    tokens = np.arange(1000, dtype=np.uint16)
    alone = Sampler(tokens, config)
    ranks = [Sampler(tokens, config, rank=rank, processes=processes) for rank in range(processes)]
    for step in (0, 1, 2, 11, 12, 30):
        whole = np.concatenate([alone.batch(step, micro)[0] for micro in range(2)])
        parts = [rank.batch(step, micro)[0] for rank in ranks for micro in range(rank.gradient_accumulation_steps)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_an_error_while_reading_ahead_is_raised(small_chunks):
    class Tokens:
        is_broken = False

        def __len__(self):
            return 1001

        def __getitem__(self, part):
            if self.is_broken:
                raise FileError("train-00001.bin is damaged")
            return np.arange(*part.indices(1001), dtype=np.uint16)

    tokens = Tokens()
    draws = Sampler(tokens, replace(TINY_TRAIN, sequence_length=10, batch_size=1, gradient_accumulation_steps=1))
    draws.batch(0, 0)
    tokens.is_broken = True
    with pytest.raises(FileError, match="train-00001"):
        draws.batch(1, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_billion_tokens_take_little_memory(tmp_path):
    """20 GB of a sparse file, in another process."""
    with (tmp_path / "train-00000.bin").open("wb") as file:
        try:
            file.truncate(20_000_000_000)
        except OSError:
            pytest.skip("no sparse files here")
    program = (
        "import re, sys; from pathlib import Path; from dataclasses import replace\n"
        "from gpt2.data.token_files import TokenFiles; from gpt2.data.sampler import Sampler\n"
        "from gpt2.config import TrainConfig\n"
        "def peak(): return 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak()\n"
        f"config = TrainConfig(**{{**{vars(replace(TINY_TRAIN, sequence_length=1024))!r}}})\n"
        "sampler = Sampler(TokenFiles([Path(sys.argv[1])], [10**10], ['']), config)\n"
        "for step in (0, 1, 2100, 10**5, 3 * 10**6): sampler.batch(step, 0)\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", program, tmp_path / "train-00000.bin"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert 20e6 < int(done.stdout) < 200e6


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (3, [0, 20, 41]), (99, [0, 10, 20, 30, 41])])
def test_spread_windows_reach_from_the_start_to_the_end(count, expected):
    tokens = np.arange(52, dtype=np.uint16)
    batches = list(spread_windows(tokens, sequence_length=10, batch_size=2, count=count))
    inputs, targets = (np.concatenate(each) for each in zip(*batches, strict=True))
    assert inputs[:, 0].tolist() == expected
    assert np.array_equal(inputs + 1, targets)
    assert all(len(batch) <= 2 for batch, _ in batches)
