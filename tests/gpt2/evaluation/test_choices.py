import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt2 import tokenizer
from gpt2.errors import UserError
from gpt2.evaluation.choices import Question, accuracy, score_endings

QUESTIONS = [
    Question("The miller counts", ("seven spoons", "a", "the long road before dawn"), 0),
    Question("", ("Nobody", "naïve 漢字"), 1),
    Question("A grey heron forgets the river. " * 8 + "My aunt", ("mends", "paints the winter", "x", "y", "z"), 2),
]


def logprob(model, context, ending, context_length):
    """By the definition, one ending at a time."""
    prefix = tokenizer.encode(context) if context else [tokenizer.END_OF_TEXT]
    tokens = (prefix + tokenizer.encode(" " + ending))[-context_length - 1 :]
    logits = model(torch.tensor([tokens[:-1]]))[0][0]
    losses = F.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
    return -losses[-len(tokenizer.encode(" " + ending)) :].sum().item()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_each_ending_is_scored_after_its_context(tiny_model, batch_size):
    done = []
    found = score_endings(tiny_model, QUESTIONS, context_length=32, batch_size=batch_size, progress=done.append)
    for question, sums in zip(QUESTIONS, found, strict=True):
        expected = [logprob(tiny_model, question.context, ending, 32) for ending in question.endings]
        assert sums == pytest.approx(expected, abs=1e-4)
    assert sum(done) == 10


def test_an_ending_longer_than_the_context_is_an_error(tiny_model):
    with pytest.raises(UserError, match="an ending has 5 tokens, and the context of the model 4"):
        score_endings(tiny_model, [Question("a", ("one two three four five",), 0)], context_length=4, batch_size=1)


def test_accuracies_have_standard_errors():
    question = Question("", ("ab", "abcdefgh"), 1)
    # the short ending is likelier, and the long one for each character; then both ways; then neither
    logprobs = [np.array([-2.0, -4.0]), np.array([-5.0, -4.0]), np.array([-1.0, -9.0]), np.array([-5.0, -4.0])]
    found = accuracy([question] * 4, logprobs)
    assert (found.acc, found.acc_norm, found.questions) == (0.5, 0.75, 4)
    assert found.acc_stderr == pytest.approx(math.sqrt(0.5 * 0.5 / 3))
    assert found.acc_norm_stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert accuracy([question], logprobs[:1]).acc_stderr == 0
