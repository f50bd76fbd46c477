import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt2 import tokenizer
from gpt2.evaluation import memorization
from gpt2.evaluation.memorization import longest_verbatim
from gpt2.evaluation.scores import score, token_losses
from gpt2.training.mixed_precision import MixedPrecisionModel
from gpt2.training.validation import validation_loss


@pytest.fixture
def tokens(text):
    return np.array(tokenizer.encode(text[:1500]), dtype=np.uint16)


def expected_losses(model, tokens, length):
    """A plain reference, window by window."""
    losses = []
    for start in range(0, len(tokens) - 1, length):
        window = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))
        logits = model(window[None, :-1])[0][0]
        losses += F.cross_entropy(logits, window[1:], reduction="none").tolist()
    return losses


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_validation_loss_is_the_mean_over_every_token(tiny_model, tokens, batch_size):
    expected = np.mean(expected_losses(tiny_model, tokens, 16))
    found = validation_loss(
        MixedPrecisionModel(tiny_model, torch.float32), tokens, sequence_length=16, batch_size=batch_size
    )
    assert found == pytest.approx(expected, rel=1e-6)


def test_token_losses_match_the_windows(tiny_model, tokens):
    assert token_losses(tiny_model, tokens, sequence_length=16) == pytest.approx(
        expected_losses(tiny_model, tokens, 16), rel=1e-4
    )


def test_scores_follow_their_definitions(tiny_model, tokens):
    done = []
    scores = score(tiny_model, tokens, sequence_length=16, batch_size=3, progress=done.append)
    losses = expected_losses(tiny_model, tokens, 16)
    num_bytes = len(tokenizer.decode(tokens[1:].tolist()).encode())
    assert scores.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert scores.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert scores.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / num_bytes, rel=1e-5)
    assert (scores.tokens, scores.bytes) == (len(tokens) - 1, num_bytes)
    assert sum(done) == len(tokens) - 1


def test_accuracies_count_the_right_token_among_the_likeliest(tiny_model, tokens):
    inputs = torch.from_numpy(tokens[:17].astype(np.int64))
    best = tiny_model(inputs[None, :-1])[0][0].topk(5).indices
    top1 = (best[:, 0] == inputs[1:]).float().mean().item()
    top5 = (best == inputs[1:, None]).any(dim=1).float().mean().item()
    scores = score(tiny_model, tokens[:17], sequence_length=16, batch_size=1)
    assert (scores.top1_accuracy, scores.top5_accuracy) == pytest.approx((top1, top5))


def test_a_model_that_knows_the_text_is_always_right(tokens):
    class Oracle(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, idx, targets):
            return F.one_hot(targets, 50257) * 30.0, torch.tensor(0.0)

    scores = score(Oracle(), tokens[:50], sequence_length=16, batch_size=2)
    assert (scores.loss, scores.top1_accuracy, scores.top5_accuracy) == (0, 1, 1)


@pytest.mark.parametrize("stretch", [50, 1 << 20])
def test_longest_verbatim_finds_the_longest_passage(text, monkeypatch, stretch):
    monkeypatch.setattr(memorization, "CHUNK_TOKENS", stretch)
    tokens = np.array(tokenizer.encode(text), dtype=np.uint16)
    passage = text[4321:4421]
    samples = ["Nothing of this kind. " + text[100:130], f"@@{passage}@@ and more", "x"]
    assert longest_verbatim(samples, tokens) == max(
        (s[i:j] for s in samples for i in range(len(s)) for j in range(i, len(s) + 1) if s[i:j] in text), key=len
    )
    assert passage in longest_verbatim(samples, tokens)


def test_without_a_copy_longest_verbatim_is_empty(text):
    tokens = np.array(tokenizer.encode(text), dtype=np.uint16)
    assert longest_verbatim(["qqqqqqqqqqqqqqqq", ""], tokens) == ""
    assert longest_verbatim([], tokens) == ""
