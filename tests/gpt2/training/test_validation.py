import numpy as np
import pytest
import torch

from gpt2 import tokenizer
from gpt2.data.sampler import windows
from gpt2.training.mixed_precision import MixedPrecisionModel
from gpt2.training.validation import validation_loss
from tests.gpt2.reference import expected_losses


@pytest.fixture
def tokens(text):
    return np.array(tokenizer.encode(text[:1500]), dtype=np.uint16)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_validation_loss_is_the_mean_over_every_token(tiny_model, tokens, batch_size):
    expected = np.mean(expected_losses(tiny_model, tokens, 16))
    found = validation_loss(
        MixedPrecisionModel(tiny_model, torch.float32), tokens, sequence_length=16, batch_size=batch_size
    )
    assert found == pytest.approx(expected, rel=1e-6)


def test_progress_counts_the_targets_and_the_model_keeps_no_gradients(tiny_model, tokens):
    counts = []
    model = MixedPrecisionModel(tiny_model, torch.float32)
    validation_loss(model, tokens, sequence_length=16, batch_size=3, progress=counts.append)
    assert sum(counts) == len(tokens) - 1
    assert len(counts) == len(list(windows(tokens, 16, 3)))
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
