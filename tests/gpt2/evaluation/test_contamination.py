import numpy as np
import pytest

from gpt2.evaluation import contamination as module
from gpt2.evaluation.contamination import NGRAM_TOKENS, contamination, ngram_hashes
from gpt2.tokenizer import END_OF_TEXT


def plainly(held_out, training):
    """The definition, with sets."""
    grams = {tuple(training[i : i + 13]) for i in range(len(training) - 12)}
    covered = np.zeros(len(held_out), dtype=bool)
    for i in range(len(held_out) - 12):
        gram = tuple(held_out[i : i + 13])
        if END_OF_TEXT not in gram and gram in grams:
            covered[i : i + 13] = True
    return covered.sum() / sum(token != END_OF_TEXT for token in held_out)


@pytest.mark.parametrize("chunk", [5, 64, 1 << 20])
def test_it_is_the_share_of_tokens_in_a_shared_ngram(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk)
    generator = np.random.default_rng(0)
    training = generator.integers(500, size=900).astype(np.uint16)
    held_out = generator.integers(500, size=400).astype(np.uint16)
    held_out[:20] = training[-20:]
    held_out[100:113] = training[60:73]
    held_out[200:212] = training[300:312]  # twelve: one too few
    held_out[380:400] = training[:20]
    read = []
    found = contamination(held_out, training, progress=read.append)
    assert found == pytest.approx(plainly(held_out.tolist(), training.tolist())) == pytest.approx(53 / 400)
    assert sum(read) == 900


def test_ngrams_do_not_cross_documents():
    document = np.arange(13, dtype=np.uint16)
    end = np.array([END_OF_TEXT], dtype=np.uint16)
    tokens = np.concatenate([document[:8], end, document, end, document[8:]])
    assert contamination(tokens, tokens) == pytest.approx(13 / 26)


@pytest.mark.parametrize("length", [0, 1, 12])
def test_a_text_shorter_than_an_ngram_is_clean(length):
    tokens = np.arange(20, dtype=np.uint16)
    assert contamination(tokens[:length], tokens) == 0
    assert contamination(tokens, tokens[:length]) == 0
    assert contamination(tokens, tokens) == 1


def test_only_the_first_tokens_of_a_long_text_are_looked_at(monkeypatch):
    monkeypatch.setattr(module, "MAX_TOKENS", 20)
    tokens = np.arange(60, dtype=np.uint16)
    assert contamination(tokens, tokens[:20]) == 1


def test_hashes_differ_for_other_tokens_and_another_order():
    tokens = np.random.default_rng(0).integers(50257, size=200_000).astype(np.uint16)
    hashes = ngram_hashes(tokens)
    assert len(hashes) == len(tokens) - NGRAM_TOKENS + 1
    assert len(set(hashes.tolist())) == len(hashes)
    swapped = tokens[:13].copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert ngram_hashes(tokens[:13]) == hashes[0] != ngram_hashes(swapped)
    zeros = [int(ngram_hashes(np.eye(13, dtype=np.uint16)[i])[0]) for i in range(13)]
    assert len({0, *zeros}) == 14
