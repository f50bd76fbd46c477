from dataclasses import replace

import numpy as np
import pytest

from gpt2.data.sampler import Sampler, windows
from gpt2.errors import UserError
from tests.conftest import TINY_TRAIN


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
    draws = sampler(num_tokens=401, batch_size=4, gradient_accumulation_steps=1)
    starts = [int(row[0]) for step in range(10) for row in draws.batch(step, 0)[0]]
    assert draws.num_windows == 40
    assert sorted(starts) == list(range(0, 400, 10))
    again = [int(row[0]) for step in range(10, 20) for row in draws.batch(step, 0)[0]]
    assert sorted(again) == sorted(starts)
    assert again != starts


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


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_run_resumes_in_any_epoch(epoch):
    whole = sampler(num_tokens=401, gradient_accumulation_steps=1)  # ten batches in an epoch
    batches = [whole.batch(step, 0)[0] for step in range(30)]
    resumed = sampler(num_tokens=401, gradient_accumulation_steps=1)
    assert np.array_equal(resumed.batch(10 * epoch, 0)[0], batches[10 * epoch])


def test_each_epoch_has_an_offset_of_its_own():
    draws = sampler(num_tokens=406, gradient_accumulation_steps=1)  # 40 windows and 5 tokens to spare
    offsets = {int(start) % 10 for epoch in range(40) for start in draws.batch(10 * epoch, 0)[0][:, 0]}
    assert offsets == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("num_tokens", [11, 12, 61, 65])
def test_windows_are_never_empty_and_hold_token_ids(num_tokens):
    for inputs, targets in windows(np.arange(num_tokens, dtype=np.uint16), sequence_length=10, batch_size=3):
        assert inputs.size == targets.size > 0
        assert inputs.dtype == targets.dtype == np.int64  # what an embedding takes
