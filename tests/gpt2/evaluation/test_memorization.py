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


def test_without_a_copy_longest_verbatim_is_empty(text):
    tokens = np.array(tokenizer.encode(text), dtype=np.uint16)
    assert longest_verbatim(["qqqqqqqqqqqqqqqq", ""], tokens) == ""
    assert longest_verbatim([], tokens) == ""
