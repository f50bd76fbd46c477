import pytest
import torch

from gpt2.training.optimizers import Optimizer, learning_rate_at, parameter_groups


def test_learning_rate_at_its_corners(train_config):
    config = train_config(max_steps=101, warmup_steps=10, learning_rate=1.1, min_learning_rate=0.1)
    assert learning_rate_at(0, config) == pytest.approx(0.1)
    assert learning_rate_at(9, config) == pytest.approx(1.0)
    assert learning_rate_at(10, config) == pytest.approx(1.1)
    assert learning_rate_at(55, config) == pytest.approx(0.6)  # half of the way down the cosine
    assert learning_rate_at(100, config) == pytest.approx(0.1)


def test_learning_rate_rises_then_falls(train_config):
    config = train_config(max_steps=50, warmup_steps=7)
    rates = [learning_rate_at(step, config) for step in range(50)]
    assert rates[:8] == sorted(rates[:8])
    assert rates[7:] == sorted(rates[7:], reverse=True)


def test_linear_decay_at_its_corners(train_config):
    config = train_config(max_steps=101, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1, schedule="linear")
    assert [learning_rate_at(step, config) for step in (10, 55, 100)] == pytest.approx([1.0, 0.55, 0.1])


def test_warm_up_stable_decay_at_its_corners(train_config):
    config = train_config(
        max_steps=101, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.0, schedule="wsd", decay_fraction=0.2
    )
    assert learning_rate_at(9, config) == pytest.approx(10 / 11)
    assert {learning_rate_at(step, config) for step in range(10, 81)} == {1.0}
    assert [learning_rate_at(step, config) for step in (81, 90, 100)] == pytest.approx([0.95, 0.5, 0.0])


def test_a_decay_of_all_steps_starts_after_the_warm_up(train_config):
    config = train_config(max_steps=50, warmup_steps=10, schedule="wsd", decay_fraction=1.0)
    assert learning_rate_at(10, config) == pytest.approx(config.learning_rate)
    assert learning_rate_at(49, config) == pytest.approx(config.min_learning_rate)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_runs_have_a_learning_rate(train_config, steps, schedule):
    config = train_config(max_steps=steps, warmup_steps=steps - 1, schedule=schedule)
    assert learning_rate_at(steps - 1, config) == pytest.approx(config.learning_rate)


def test_only_matrices_decay(tiny_model):
    decayed, kept = parameter_groups(tiny_model.parameters(), 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(list(tiny_model.parameters()))


def test_one_step_of_adamw_matches_the_paper(train_config):
    # with bias correction the first step is lr * sign(gradient), after the decay lr * weight_decay * weight
    layer = torch.nn.Linear(3, 2)
    config = train_config(learning_rate=0.01, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = Optimizer(layer, config)
    (layer(torch.tensor([[1.0, -2.0, 3.0]])) * torch.tensor([1.0, -1.0])).sum().backward()
    optimizer.step()
    for name, parameter in layer.named_parameters():
        decay = 0.01 * 0.5 * before[name] if name == "weight" else 0.0
        expected = before[name] - decay - 0.01 * parameter.grad.sign()
        assert torch.allclose(parameter, expected, atol=1e-6), name


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest(tiny_model, train_config):
    optimizer = Optimizer(tiny_model, train_config(optimizer="muon"))
    names = {id(p): name for name, p in tiny_model.named_parameters()}
    muon = {names[id(p)] for group in optimizer.parts["muon"].param_groups for p in group["params"]}
    adamw = {names[id(p)] for group in optimizer.parts["adamw"].param_groups for p in group["params"]}
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert muon == {f"transformer.h.{layer}.{kind}.weight" for layer in range(2) for kind in kinds}
    assert muon | adamw == set(names.values())
    assert not muon & adamw


def test_muons_update_is_orthogonal(tiny_model, train_config):
    config = train_config(optimizer="muon", weight_decay=0.0, muon_learning_rate=0.5, learning_rate=1.0)
    optimizer = Optimizer(tiny_model, config)
    optimizer.set_learning_rate(0.1)  # a tenth of the highest, for both
    weight = tiny_model.transformer["h"][0].mlp.c_fc.weight  # (4 C, C)
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight) * 1e-3
    optimizer.step()
    update = (before - weight.detach()) / (0.5 * 0.1 * 2.0)  # sqrt(4 C / C) is 2
    singular = torch.linalg.svdvals(update)
    assert 0.6 < singular.min() < singular.max() < 1.3  # Newton-Schulz in five steps comes this near to 1


def test_the_state_of_adamw_alone_is_that_of_torch(tiny_model, train_config):
    optimizer = Optimizer(tiny_model, train_config())
    torch.optim.AdamW(optimizer.parts["adamw"].param_groups).load_state_dict(optimizer.state_dict())
