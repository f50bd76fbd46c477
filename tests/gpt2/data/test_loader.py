from dataclasses import replace

import numpy as np
import pytest
import torch

from gpt2.data.loader import BatchLoader
from gpt2.data.sampler import Sampler
from tests.conftest import TINY_TRAIN
from tests.gpt2.training.small_run import Recorder, Run


@pytest.fixture
def sampler():
    config = replace(TINY_TRAIN, sequence_length=10, batch_size=2, gradient_accumulation_steps=2)
    return Sampler(np.arange(500, dtype=np.uint16), config)


@pytest.fixture
def loader(sampler):
    loader = BatchLoader(sampler, start_step=3, max_steps=5, device=torch.device("cpu"))
    yield loader
    loader.close()


def assert_is_batch(batch, expected):
    for tensor, array in zip(batch, expected, strict=True):
        assert np.array_equal(tensor.numpy(), array)


def test_micro_batches_come_in_order_from_a_step_to_the_last(loader, sampler):
    for step, micro_step in ((3, 0), (3, 1), (4, 0), (4, 1)):
        assert_is_batch(loader.next(), sampler.batch(step, micro_step))
    with pytest.raises(StopIteration):
        loader.next()


def test_seek_repeats_a_step_from_its_first_micro_batch(loader, sampler):
    for _ in range(3):
        loader.next()
    loader.seek(3)
    assert_is_batch(loader.next(), sampler.batch(3, 0))


def test_an_error_while_reading_batches_is_raised(tokens, train_config, monkeypatch):
    def fail(self, step, micro_step):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Sampler, "batch", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        Run(tokens, train_config()).go(Recorder())
