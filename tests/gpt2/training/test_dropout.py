"""Dropout: where it acts, that each micro-batch has its own masks, and that they are the same again."""

import copy

import pytest
import torch
import torch.nn.functional as F

from gpt2.config import GPTConfig
from gpt2.model.attention import causal_attention, within_documents
from gpt2.model.transformer import GPT
from gpt2.training.accumulation import seed_dropout
from gpt2.training.mixed_precision import MixedPrecisionModel
from gpt2.training.state import checkpoint_content, restore_checkpoint
from tests.conftest import TINY, needs_compiler
from tests.gpt2.training.small_run import Recorder, Run

SMALL = GPTConfig(block_size=16, vocab_size=97, n_layer=2, n_head=2, n_embd=16)
WIDE = GPTConfig(block_size=64, vocab_size=97, n_layer=2, n_head=4, n_embd=128)


def dropping(config, dropout, precision=torch.float32, **options):
    torch.manual_seed(0)
    model = GPT(config)
    model.dropout = dropout
    return MixedPrecisionModel(model, precision, **options)


def batch(config, size=4):
    tokens = torch.randint(config.vocab_size, (size, config.block_size + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(compute, seed=0):
    """The loss and all gradients of a batch, as one vector."""
    compute.zero_grad()
    torch.manual_seed(seed)
    loss = compute.loss(*batch(compute.config))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in compute.master.parameters()])


def test_it_acts_at_the_three_places_of_gpt2(monkeypatch):
    compute = dropping(SMALL, 0.5)
    shapes = []
    monkeypatch.setattr(F, "dropout", lambda x, p: shapes.append((tuple(x.shape), p)) or x)
    gradients(compute)
    residual, probabilities = ((4, 16, 16), 0.5), ((4, 2, 16, 16), 0.5)
    assert shapes == [residual, *([probabilities, residual, residual] * SMALL.n_layer)]


def test_without_dropout_nothing_of_it_is_computed(monkeypatch):
    compute = dropping(SMALL, 0.0)
    monkeypatch.setattr(F, "dropout", None)
    gradients(compute)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_it_acts_only_where_gradients_are_computed(precision):
    with torch.no_grad():
        losses = [dropping(SMALL, dropout, precision).loss(*batch(SMALL)).item() for dropout in (0.0, 0.5)]
    assert losses[0] == losses[1]
    assert gradients(dropping(SMALL, 0.5, precision))[0] != losses[0]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_dropout_has_the_mean_of_attention_without(masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 8, 16)
    idx = torch.tensor([[1, 2, 50256, 3, 4, 50256, 5, 6]])
    visible = within_documents(idx) if masked else None
    mean = sum(causal_attention(q, k, v, visible, 0.3) for _ in range(4000)) / 4000
    assert torch.allclose(mean, causal_attention(q, k, v, visible), atol=0.1)
    probabilities = causal_attention(q, k, torch.eye(8).expand(1, 2, 8, 8), visible, 0.3)
    assert ((probabilities > 0) <= (causal_attention(q, k, torch.eye(8).expand(1, 2, 8, 8), visible) > 0)).all()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_drops_the_same(precision):
    expected = gradients(dropping(SMALL, 0.3, precision))
    found = gradients(dropping(SMALL, 0.3, precision, gradient_checkpointing=True))
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


def numerical_slope(compute, seed):
    """The slope of the loss along the gradient, by differences, with the masks of a seed."""
    _, gradient = gradients(compute, seed)
    direction = gradient / gradient.norm()
    losses = []
    for step in (1e-2, -1e-2):
        moved = copy.deepcopy(list(compute.master.parameters()))
        place = 0
        with torch.no_grad():
            for parameter in compute.master.parameters():
                parameter += step * direction[place : place + parameter.numel()].view_as(parameter)
                place += parameter.numel()
        losses.append(gradients(compute, seed)[0])
        with torch.no_grad():
            for parameter, before in zip(compute.master.parameters(), moved, strict=True):
                parameter.copy_(before)
    return (losses[0] - losses[1]) / 2e-2, gradient.norm().item()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_compiled_dropout_is_the_same_again_and_its_gradients_are_those_of_its_masks(precision, checkpointing):
    plain = dropping(WIDE, 0.3, precision, gradient_checkpointing=checkpointing)
    compute = dropping(WIDE, 0.3, precision, gradient_checkpointing=checkpointing)
    compute.compile(4, WIDE.block_size)
    first, again, other = gradients(compute), gradients(compute), gradients(compute, seed=1)
    assert first[0] == again[0]
    assert torch.equal(first[1], again[1])
    assert first[0] != other[0]
    assert first[1].norm().item() == pytest.approx(gradients(plain)[1].norm().item(), rel=0.1)
    if precision == torch.float32:
        slope, norm = numerical_slope(compute, 0)
        assert slope == pytest.approx(norm, rel=0.02)
    with torch.no_grad():
        without = compute.loss(*batch(WIDE)).item()
        assert without == pytest.approx(dropping(WIDE, 0.0, precision).loss(*batch(WIDE)).item(), rel=1e-3)


def test_each_micro_batch_has_masks_of_its_own():
    def draw(*place):
        seed_dropout(*place)
        return torch.rand(1).item()

    places = [(1, 0, 0, 0), (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (2**63 - 1, 10**9, 63, 1023)]
    assert len({draw(*place) for place in places}) == len(places)
    assert draw(1, 2, 3, 4) == draw(1, 2, 3, 4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_with_dropout_resumes_exactly(tokens, train_config, checkpointing):
    config = train_config(dropout=0.2)
    whole, parts, resumed = (Run(tokens, config, gradient_checkpointing=checkpointing) for _ in range(3))
    whole.go(Recorder())
    assert not parts.go(Recorder(stop_after=3))
    content = copy.deepcopy(checkpoint_content(parts.model, parts.optimizer, parts.state))
    torch.rand(7)  # whatever else drew random numbers
    resumed.state = restore_checkpoint(content, resumed.model, resumed.optimizer)
    assert resumed.go(Recorder())
    assert torch.equal(resumed.weights(), whole.weights())


def test_dropout_changes_the_training_and_not_what_comes_out(tokens, train_config):
    plain, dropped, again = (Run(tokens, train_config(dropout=p)) for p in (0.0, 0.2, 0.2))
    for run in (plain, dropped, again):
        run.go(Recorder())
    assert torch.equal(dropped.weights(), again.weights())
    assert not torch.equal(dropped.weights(), plain.weights())
    assert dropped.model.config == plain.model.config == TINY
