import pytest
import torch

from benchmarks import steps, train
from gpt2.config import GPT2_VOCAB_SIZE
from tests.conftest import TINY

CPU = torch.device("cpu")


@pytest.mark.parametrize("contender", [*train.OURS.values(), *train.PEERS.values()], ids=[*train.OURS, *train.PEERS])
def test_each_contender_runs_a_step(contender):
    batches = [tuple(torch.randint(0, TINY.vocab_size, (2, 16)) for _ in range(2))]
    step = steps.make_step({**contender, "compile": False}, TINY, torch.float32, CPU, batches)
    step()
    step()


def test_the_tokens_of_a_text_share_a_row_if_they_are_rare(tokens, monkeypatch):
    monkeypatch.setattr(steps.paths, "TOKENS", tokens)
    batches, vocabulary = steps.text_batches(2, 16, 2, CPU)
    (first, first_targets), (second, _) = batches
    assert first.shape == second.shape == (2, 16)
    assert torch.equal(first.flatten()[1:], first_targets.flatten()[:-1])
    assert not torch.equal(first, second)
    assert len(vocabulary.tokens) + vocabulary.shared == GPT2_VOCAB_SIZE
    steps.make_step({"compile": False}, TINY, torch.float32, CPU, batches, vocabulary=vocabulary)()
