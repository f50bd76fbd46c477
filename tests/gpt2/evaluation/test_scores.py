import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt2 import tokenizer
from gpt2.evaluation.scores import score, token_losses
from tests.gpt2.reference import expected_losses


@pytest.fixture
def tokens(text):
    return np.array(tokenizer.encode(text[:1500]), dtype=np.uint16)


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
    tokens = tokens[np.sort(np.unique(tokens, return_index=True)[1])][:50]  # each token once
    following = dict(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))

    class Oracle(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, idx):
            return F.one_hot(idx.clone().apply_(following.__getitem__), 50257) * 30.0, None

    scores = score(Oracle(), tokens, sequence_length=16, batch_size=2)
    assert (scores.loss, scores.top1_accuracy, scores.top5_accuracy) == (0, 1, 1)


def test_predictions_are_those_of_the_logits(tiny_model, tokens):
    seen = []
    score(tiny_model, tokens[:40], sequence_length=16, batch_size=2, observe=seen.append)
    assert [batch.losses.shape for batch in seen] == [(2, 16), (1, 7)]
    inputs = torch.from_numpy(tokens[:33].astype(np.int64))
    logits = tiny_model(inputs[:-1].view(2, 16))[0]
    assert seen[0].targets.ravel().tolist() == tokens[1:33].tolist()
    assert seen[0].confidences == pytest.approx(logits.softmax(2).amax(2).detach().numpy(), rel=1e-5)
    order = logits.argsort(dim=2, descending=True)
    ranks = (order == inputs[1:].view(2, 16, 1)).int().argmax(dim=2)
    assert seen[0].ranks.tolist() == ranks.tolist()


def test_the_end_of_a_document_counts_as_a_token_but_not_as_text(tiny_model, tokens):
    tokens = np.insert(tokens[:100], 50, tokenizer.END_OF_TEXT)
    scores = score(tiny_model, tokens, sequence_length=16, batch_size=2)
    losses = np.array(expected_losses(tiny_model, tokens, 16))
    num_bytes = len(tokenizer.decode(np.delete(tokens, 50)[1:].tolist()).encode())
    assert scores.bytes == num_bytes
    assert scores.loss == pytest.approx(losses.mean(), rel=1e-6)
    assert scores.bits_per_byte == pytest.approx(np.delete(losses, 49).sum() / math.log(2) / num_bytes, rel=1e-6)
