from dataclasses import replace

import numpy as np
import pytest
import torch

from gpt2.model.transformer import GPT
from gpt2.training.mixed_precision import MixedPrecisionModel
from gpt2.training.vocabulary import TextVocabulary
from tests.conftest import TINY

SMALL = replace(TINY, vocab_size=50)
OCCURRING = [3, 4, 10, 11, 12, 30, 49]


@pytest.fixture
def vocabulary():
    counts = np.zeros(SMALL.vocab_size, dtype=np.int64)
    counts[OCCURRING] = [5, 1, 2, 1, 1, 9, 4]
    return TextVocabulary(counts)


@pytest.fixture
def pair(vocabulary):
    """A model with K + 1 rows, and the same model with all V."""
    torch.manual_seed(1)
    small = GPT(vocabulary.config(SMALL))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.normal_(0, 0.5)
    whole = GPT(SMALL)
    whole.load_state_dict(vocabulary.whole(small.state_dict()))
    return MixedPrecisionModel(small, torch.float32, vocabulary=vocabulary), MixedPrecisionModel(whole, torch.float32)


def batch(of):
    generator = np.random.default_rng(2)
    inputs, targets = (torch.from_numpy(generator.choice(of, (2, 16))) for _ in range(2))
    return inputs, targets


def test_the_tokens_that_do_not_occur_share_the_last_row(vocabulary):
    assert vocabulary.tokens.tolist() == OCCURRING
    assert vocabulary.shared == SMALL.vocab_size - len(OCCURRING)
    assert vocabulary.config(SMALL) == replace(SMALL, vocab_size=len(OCCURRING) + 1)
    assert vocabulary.rows(torch.tensor([[3, 49], [0, 13]])).tolist() == [[0, 6], [7, 7]]


def test_tokens_that_occur_fewer_times_share_it_too():
    vocabulary = TextVocabulary(np.array([0, 1, 2, 3, 1]), min_count=2)
    assert vocabulary.tokens.tolist() == [2, 3]
    assert vocabulary.shared == 3
    assert vocabulary.rows(torch.arange(5)).tolist() == [2, 2, 0, 1, 2]


def test_the_whole_model_has_a_row_for_each_token(pair, vocabulary):
    small, whole = (model.master.state_dict() for model in pair)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        assert whole[name].shape == (SMALL.vocab_size, SMALL.n_embd)
        assert torch.equal(whole[name][OCCURRING], small[name][:-1])
        assert torch.equal(whole[name][5], small[name][-1])
    assert torch.equal(whole["transformer.wpe.weight"], small["transformer.wpe.weight"])


@pytest.mark.parametrize("tokens", [OCCURRING, range(SMALL.vocab_size)], ids=["of the text", "of another text"])
def test_loss_and_gradients_are_those_of_the_whole_model(pair, tokens):
    small, whole = pair
    losses = []
    for model in pair:
        loss = model.loss(*batch(tokens))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    gradients = dict(small.master.named_parameters())
    for name, parameter in whole.master.named_parameters():
        expected = parameter.grad
        if parameter.size(0) == SMALL.vocab_size:
            others = [token for token in range(SMALL.vocab_size) if token not in OCCURRING]
            expected = torch.cat([expected[OCCURRING], expected[others].sum(0, keepdim=True)])
        torch.testing.assert_close(gradients[name].grad, expected, rtol=1e-4, atol=1e-6)


def test_documents_are_masked_by_the_ids_of_the_text(vocabulary):
    torch.manual_seed(1)
    master = GPT(vocabulary.config(SMALL))
    seen = []
    master.visible = lambda idx: seen.append(idx.clone())  # type: ignore[method-assign]
    inputs, targets = batch(OCCURRING)
    MixedPrecisionModel(master, torch.float32, vocabulary=vocabulary).loss(inputs, targets)
    assert torch.equal(seen[0], inputs)
