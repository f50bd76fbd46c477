from dataclasses import replace

import numpy as np
import pytest

from gpt2.data.sampler import Sampler, windows
from gpt2.errors import UserError
from tests.conftest import TINY_TRAIN


def sampler(num_tokens, batch_size=4):
    config = replace(TINY_TRAIN, sequence_length=10, batch_size=batch_size, gradient_accumulation_steps=1)
    return Sampler(np.arange(num_tokens, dtype=np.uint16), config)


def test_a_split_of_one_window_is_enough():
    inputs, targets = sampler(num_tokens=11, batch_size=2).batch(0, 0)
    assert inputs.tolist() == 2 * [list(range(10))]
    assert targets.tolist() == 2 * [list(range(1, 11))]


def test_the_error_for_a_short_split_names_the_parameter_to_change():
    with pytest.raises(UserError, match=r"smaller train\.sequence_length"):
        sampler(num_tokens=10)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_run_resumes_in_any_epoch(epoch):
    whole = sampler(num_tokens=401)  # ten batches in an epoch
    batches = [whole.batch(step, 0)[0] for step in range(30)]
    resumed = sampler(num_tokens=401)
    assert np.array_equal(resumed.batch(10 * epoch, 0)[0], batches[10 * epoch])


def test_each_epoch_has_an_offset_of_its_own():
    draws = sampler(num_tokens=406)  # 40 windows and 5 tokens to spare
    offsets = {int(start) % 10 for epoch in range(40) for start in draws.batch(10 * epoch, 0)[0][:, 0]}
    assert offsets == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("num_tokens", [11, 12, 61, 65])
def test_windows_are_never_empty_and_hold_token_ids(num_tokens):
    for inputs, targets in windows(np.arange(num_tokens, dtype=np.uint16), sequence_length=10, batch_size=3):
        assert inputs.size == targets.size > 0
        assert inputs.dtype == targets.dtype == np.int64  # what an embedding takes
