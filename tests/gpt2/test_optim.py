import pytest
import torch

from gpt2.optim import adamw, lr_at, parameter_groups


def test_learning_rate_at_its_corners(train_config):
    config = train_config(max_steps=101, warmup_steps=10, learning_rate=1.1, min_learning_rate=0.1)
    assert lr_at(0, config) == pytest.approx(0.1)
    assert lr_at(9, config) == pytest.approx(1.0)
    assert lr_at(10, config) == pytest.approx(1.1)
    assert lr_at(55, config) == pytest.approx(0.6)  # half of the way down the cosine
    assert lr_at(100, config) == pytest.approx(0.1)


def test_learning_rate_rises_then_falls(train_config):
    config = train_config(max_steps=50, warmup_steps=7)
    rates = [lr_at(step, config) for step in range(50)]
    assert rates[:8] == sorted(rates[:8])
    assert rates[7:] == sorted(rates[7:], reverse=True)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_runs_have_a_learning_rate(train_config, steps):
    config = train_config(max_steps=steps, warmup_steps=steps - 1)
    assert lr_at(steps - 1, config) == pytest.approx(config.learning_rate)


def test_only_matrices_decay(tiny_model):
    decayed, kept = parameter_groups(tiny_model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(list(tiny_model.parameters()))


def test_adamw_takes_one_step_as_published(train_config):
    # with bias correction the first step is lr * sign(gradient), after the decay lr * weight_decay * weight
    layer = torch.nn.Linear(3, 2)
    config = train_config(learning_rate=0.01, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = adamw(layer, config)
    (layer(torch.tensor([[1.0, -2.0, 3.0]])) * torch.tensor([1.0, -1.0])).sum().backward()
    optimizer.step()
    for name, parameter in layer.named_parameters():
        decay = 0.01 * 0.5 * before[name] if name == "weight" else 0.0
        expected = before[name] - decay - 0.01 * parameter.grad.sign()
        assert torch.allclose(parameter, expected, atol=1e-6), name
