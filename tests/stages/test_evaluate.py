import numpy as np
import pytest

from stages import evaluate
from stages.params import load_params
from tests.conftest import ROOT


@pytest.fixture
def params():
    return load_params(ROOT / "params.yaml")


def test_samples_are_shown_with_prompts_and_verbatim_copies(params):
    text = evaluate.describe_samples(
        params.evaluate, ["ROMEO:\n", "a", ""], ["one\ntwo", "three", "four"], "by heart\nyes", 5.25
    )
    assert "Validation loss 5.2500" in text
    assert "has 12 characters: `by heart ⏎ yes`" in text
    assert "## **ROMEO:**\n\n    one\n    two\n" in text
    assert text.count("\n## ") == 3


def test_the_passage_is_from_the_middle():
    tokens = np.arange(100, dtype=np.uint16)
    assert evaluate.middle(tokens, 10).tolist() == list(range(45, 55))
    assert evaluate.middle(tokens, 1000).tolist() == list(range(100))
