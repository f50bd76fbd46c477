import numpy as np
import pytest

from gpt2 import tokenizer
from gpt2.evaluation import memorization
from gpt2.evaluation.memorization import longest_verbatim


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


@pytest.mark.parametrize("stretch", [7, 1 << 20])
def test_text_that_repeats_in_samples_and_training_is_searched_to_the_end(monkeypatch, stretch):
    monkeypatch.setattr(memorization, "CHUNK_TOKENS", stretch)
    training = "\n".join(" " * (i % 13) + "x" * (i % 5) + " " * (3 * i % 17) for i in range(60)) + "y" + " " * 12 + "z"
    tokens = np.array(tokenizer.encode(training), dtype=np.uint16)
    samples = [" " * 12 + "z", " " * 9 + "xx" + " " * 9, " " * 14]
    found = longest_verbatim(samples, tokens)
    passages = {s[i:j] for s in samples for i in range(len(s)) for j in range(i, len(s) + 1) if s[i:j] in training}
    assert found in passages
    assert len(found) == max(map(len, passages))


def test_without_a_copy_longest_verbatim_is_empty(text):
    tokens = np.array(tokenizer.encode(text), dtype=np.uint16)
    assert longest_verbatim(["qqqqqqqqqqqqqqqq", ""], tokens) == ""
    assert longest_verbatim([], tokens) == ""
