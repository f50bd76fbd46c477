import numpy as np
import pytest

from gpt2.evaluation import bootstrap
from gpt2.evaluation.bootstrap import SegmentSums, TextUnits, ratio_interval, segment_length
from gpt2.evaluation.scores import Predictions, byte_lengths
from gpt2.tokenizer import END_OF_TEXT, encode


def units_of(targets, losses, batch_size):
    units = TextUnits()
    for first in range(0, len(targets), batch_size):
        part = slice(first, first + batch_size)
        units.add(Predictions(targets[part], losses[part], targets[part], losses[part]))
    return units


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_sums_are_by_document_if_there_are_enough(batch_size):
    generator = np.random.default_rng(0)
    targets = generator.integers(50256, size=(60, 10))
    targets.flat[generator.choice(600, size=35, replace=False)] = END_OF_TEXT
    losses = generator.random((60, 10)).astype(np.float32)
    name, nats, num_bytes = units_of(targets, losses, batch_size).sums()
    assert name == "documents"
    ends = np.flatnonzero(targets.ravel() == END_OF_TEXT)
    expected = []
    for document, loss in zip(np.split(targets.ravel(), ends), np.split(losses.ravel(), ends), strict=True):
        is_text = document != END_OF_TEXT
        expected.append((loss[is_text].sum(), byte_lengths()[document].sum()))
    expected = [pair for pair in expected if pair[1]]  # two ends beside each other
    assert list(zip(nats, num_bytes, strict=True)) == [pytest.approx(pair, rel=1e-5) for pair in expected]


def test_sums_are_by_window_for_one_document():
    targets = np.array([encode(" one two three")] * 4)
    name, nats, num_bytes = units_of(targets, np.full(targets.shape, 2, dtype=np.float32), 3).sums()
    assert name == "windows"
    assert nats.tolist() == [6] * 4
    assert num_bytes.tolist() == [14] * 4


def test_the_interval_is_that_of_the_normal_approximation_for_many_equal_units():
    numerators = np.random.default_rng(1).normal(10, 2, 500)
    low, high = ratio_interval(numerators, np.full(500, 4.0), seed=1)
    error = 1.96 * numerators.std(ddof=1) / np.sqrt(500) / 4
    assert (low, high) == pytest.approx((numerators.mean() / 4 - error, numerators.mean() / 4 + error), abs=0.1 * error)
    assert (low, high) == ratio_interval(numerators, np.full(500, 4.0), seed=1)
    assert (low, high) != ratio_interval(numerators, np.full(500, 4.0), seed=2)


def test_the_interval_covers_the_truth_95_times_in_100():
    generator = np.random.default_rng(2)
    covered = 0
    for number in range(100):
        lengths = generator.integers(50, 500, size=60).astype(float)
        nats = lengths * generator.gamma(4, 0.5, size=60)  # 2 nats per byte in the mean
        low, high = ratio_interval(nats, lengths, seed=number)
        covered += low <= 2 <= high
    assert 88 <= covered <= 99


def test_neighbours_are_drawn_together_if_there_are_many(monkeypatch):
    values = np.random.default_rng(3).random(1000)
    low, high = ratio_interval(values, np.ones(1000), seed=1)
    monkeypatch.setattr(bootstrap, "MAX_UNITS", 250)
    assert ratio_interval(values, np.ones(1000), seed=1) == pytest.approx((low, high), abs=0.25 * (high - low))


@pytest.mark.parametrize(
    ("num_targets", "length"), [(1, 128), (36_058, 128), (131_072, 128), (131_073, 256), (10**9, 2**20)]
)
def test_segments_grow_with_the_text_alone(num_targets, length):
    assert segment_length(num_targets) == length
    assert -(-num_targets // length) <= bootstrap.MAX_SEGMENTS


@pytest.mark.parametrize("shape", [(8, 50), (2, 200), (25, 16), (1, 400)])
def test_segments_are_the_same_for_any_windows(shape):
    generator = np.random.default_rng(4)
    targets = generator.integers(50256, size=400)
    targets[100:300:50] = END_OF_TEXT
    losses = generator.random(400).astype(np.float32)
    sums = SegmentSums(400)
    for batch_targets, batch_losses in zip(targets.reshape(shape), losses.reshape(shape), strict=True):
        part, loss = batch_targets[None], batch_losses[None]
        sums.add(Predictions(part, loss, part, loss))
    assert sums.segment_tokens == 128
    for index in range(4):
        part = slice(128 * index, 128 * (index + 1))
        is_text = targets[part] != END_OF_TEXT
        assert sums.nats[index] == pytest.approx(losses[part].sum())
        assert sums.text_nats[index] == pytest.approx(losses[part][is_text].sum())
        assert sums.byte_counts[index] == byte_lengths()[targets[part]].sum()
