import math

import numpy as np
import pytest

from gpt2 import tokenizer
from gpt2.data import token_files
from gpt2.data.token_files import count_tokens
from gpt2.evaluation.breakdown import Calibration, LossByFrequency, LossByPosition, measure
from gpt2.evaluation.scores import Predictions, score
from gpt2.tokenizer import END_OF_TEXT
from tests.gpt2.reference import expected_losses


def predictions(losses, **changes):
    """Predictions of windows with these losses, (B, T)."""
    losses = np.asarray(losses, dtype=np.float32)
    zeros = np.zeros(losses.shape, dtype=np.int64)
    values = {"targets": zeros, "losses": losses, "ranks": zeros, "confidences": losses * 0 + 0.5} | changes
    return Predictions(**values)


def test_loss_by_position_is_the_mean_over_windows():
    losses = np.random.default_rng(0).normal(5, 1, (40, 100))
    by_position = LossByPosition(100)
    for first in range(0, 40, 8):
        by_position.add(predictions(losses[first : first + 8]))
    by_position.add(predictions(np.full((1, 30), 99)))  # the rest of a text, shorter than a window
    bins = by_position.bins()
    assert [each.first for each in bins] == [1, *(each.last + 1 for each in bins[:-1])]
    assert bins[-1].last == 100
    assert 16 <= len(bins) <= 24
    for each in bins:
        means = losses[:, each.first - 1 : each.last].mean(axis=1)
        assert each.loss == pytest.approx(means.mean(), rel=1e-6)
        assert each.high - each.loss == pytest.approx(1.96 * means.std(ddof=1) / math.sqrt(40), rel=1e-4)
        assert each.loss - each.low == pytest.approx(each.high - each.loss)


def test_loss_by_position_of_one_window_and_of_none():
    by_position = LossByPosition(1)
    assert by_position.bins() == []
    by_position.add(predictions([[3.0]]))
    assert [(each.first, each.last, each.loss, each.low, each.high) for each in by_position.bins()] == [(1, 1, 3, 3, 3)]


def test_a_model_that_is_as_right_as_it_says_is_calibrated():
    # by hand: ten tokens at 0.9, nine of them right; ten at 0.3, five of them right
    confidences = np.array([[0.9] * 10 + [0.3] * 10])
    ranks = np.array([[0] * 9 + [4] + [0] * 5 + [1] * 5])
    calibration = Calibration()
    for half in (slice(0, 7), slice(7, 20)):
        calibration.add(predictions(np.zeros((1, 20))[:, half], confidences=confidences[:, half], ranks=ranks[:, half]))
    low, high = calibration.bins()
    assert (low.tokens, low.confidence, low.accuracy) == pytest.approx((10, 0.3, 0.5))
    assert (high.tokens, high.confidence, high.accuracy) == pytest.approx((10, 0.9, 0.9))
    assert low.low < 0.3 <= low.high
    assert calibration.error() == pytest.approx(0.5 * 0.2)


def test_a_bin_contains_its_upper_bound():
    calibration = Calibration()
    calibration.add(predictions([[0.0, 0.0]], confidences=np.array([[1.0, 1 / 15]])))
    assert [(each.low, each.high) for each in calibration.bins()] == [(0, 1 / 15), (14 / 15, 1)]


def test_loss_by_frequency_groups_tokens_by_their_count_in_training():
    counts = np.zeros(50257, dtype=np.int64)
    counts[[1, 2, 3, 4]] = [1, 10, 11, 100]  # token 0 never occurs
    by_frequency = LossByFrequency()
    by_frequency.add(predictions([[9, 8, 7]], targets=np.array([[0, 1, 2]])))
    by_frequency.add(predictions([[3, 2, 1]], targets=np.array([[3, 4, 4]])))
    assert [(each.fewest, each.most, each.tokens, each.share, each.loss) for each in by_frequency.bins(counts)] == [
        (0, 0, 1, pytest.approx(1 / 6), 9),
        (1, 10, 2, pytest.approx(2 / 6), 7.5),
        (11, 100, 3, pytest.approx(3 / 6), 2),
    ]


def test_tokens_are_counted_in_chunks(monkeypatch):
    monkeypatch.setattr(token_files, "CHUNK_TOKENS", 7)
    tokens = np.array([5, 5, END_OF_TEXT, 0] * 5, dtype=np.uint16)
    read = []
    counts = count_tokens(tokens, progress=read.append)
    assert {int(token): int(counts[token]) for token in np.flatnonzero(counts)} == {0: 5, 5: 10, END_OF_TEXT: 5}
    assert read == [7, 7, 6]


@pytest.mark.parametrize("documents", [1, 40])
def test_the_breakdown_agrees_with_the_scores(tiny_model, text, documents):
    parts = np.array_split(np.array(tokenizer.encode(text[:4000]), dtype=np.uint16), documents)
    tokens = np.concatenate([np.append(part, END_OF_TEXT) for part in parts]).astype(np.uint16)[:-1]
    scored, read = [], []
    options = {"sequence_length": 16, "batch_size": 3}
    scores, found = measure(tiny_model, tokens[::-1], tokens, seed=1, scored=scored.append, read=read.append, **options)
    assert scores == score(tiny_model, tokens, **options)
    assert (sum(scored), sum(read)) == (len(tokens) - 1, 2 * len(tokens))
    assert found.bits_per_byte_low < scores.bits_per_byte < found.bits_per_byte_high
    assert sum(each.share for each in found.frequencies) == pytest.approx(1)
    assert sum(each.share * each.loss for each in found.frequencies) == pytest.approx(scores.loss)
    assert sum(each.tokens for each in found.calibration) == scores.tokens
    right = sum(each.tokens * each.accuracy for each in found.calibration)
    assert right / scores.tokens == pytest.approx(scores.top1_accuracy)
    losses = np.array(expected_losses(tiny_model, tokens, 16))
    assert found.positions[0].loss == pytest.approx(losses[: len(losses) // 16 * 16 : 16].mean(), rel=1e-4)
    assert found.segments.nats.sum() / scores.tokens == pytest.approx(scores.loss)
    bits = found.segments.text_nats.sum() / np.log(2) / found.segments.byte_counts.sum()
    assert bits == pytest.approx(scores.bits_per_byte)
    assert found.units == ("documents" if documents == 40 else "windows")
    if documents == 40:
        assert len(found.bits_per_byte_of_units) == 40


def test_a_text_shorter_than_a_window_has_a_breakdown(tiny_model):
    tokens = np.array([5, 6, 7], dtype=np.uint16)
    scores, found = measure(tiny_model, tokens, tokens, sequence_length=16, batch_size=2, seed=1)
    assert [(each.first, each.last) for each in found.positions] == [(1, 1), (2, 2)]
    assert found.bits_per_byte_low == pytest.approx(scores.bits_per_byte) == found.bits_per_byte_high
