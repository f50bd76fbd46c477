import copy

import pytest
import torch

from gpt2.optimizers.optimizer import Optimizer, parameter_groups
from gpt2.optimizers.schedule import learning_rate_at


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


def test_a_cosine_is_no_straight_line(train_config):
    config = train_config(max_steps=101, warmup_steps=20, learning_rate=1.0, min_learning_rate=0.0)
    # a quarter and three quarters of the way: (1 + cos(pi / 4)) / 2 and (1 - cos(pi / 4)) / 2
    assert [learning_rate_at(step, config) for step in (40, 80)] == pytest.approx([0.853553, 0.146447], abs=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_after_the_last_step_the_learning_rate_stays_the_lowest(train_config, schedule):
    config = train_config(max_steps=10, schedule=schedule)
    assert learning_rate_at(15, config) == pytest.approx(config.min_learning_rate)


def test_adamw_averages_gradients_with_the_betas_of_the_configuration(train_config):
    weight = torch.nn.Parameter(torch.zeros(1))
    module = torch.nn.ParameterList([weight])
    optimizer = Optimizer(module, train_config(learning_rate=0.01, beta1=0.5, beta2=0.75))
    for gradient in (1.0, 3.0):
        before = weight.item()
        weight.grad = torch.tensor([gradient])
        optimizer.step()
    # the averages, without bias: (0.25 * 1 + 0.5 * 3) / (1 - 0.25) and (0.1875 * 1 + 0.25 * 9) / (1 - 0.5625)
    mean, square = 1.75 / 0.75, 2.4375 / 0.4375
    assert before - weight.item() == pytest.approx(0.01 * mean / square**0.5, rel=1e-4)


def test_muon_decays_its_matrices_at_its_own_learning_rate(tiny_model, train_config):
    optimizer = Optimizer(tiny_model, train_config(optimizer="muon", muon_learning_rate=0.25, weight_decay=0.5))
    weight = tiny_model.transformer["h"][0].mlp.c_fc.weight
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.allclose(weight, before * (1 - 0.25 * 0.5))


def test_the_learning_rate_of_muon_is_scaled_with_that_of_adamw(tiny_model, train_config):
    optimizer = Optimizer(tiny_model, train_config(optimizer="muon", learning_rate=0.01, muon_learning_rate=0.5))
    optimizer.set_learning_rate(0.002)
    assert [group["lr"] for group in optimizer.parts["adamw"].param_groups] == pytest.approx([0.002, 0.002])
    assert [group["lr"] for group in optimizer.parts["muon"].param_groups] == pytest.approx([0.1])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_optimizer_resumes_exactly_from_its_state(tiny_model, train_config, kind):
    def step(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    config = train_config(optimizer=kind)
    first = Optimizer(tiny_model, config)
    step(tiny_model, first, seed=1)
    resumed_model = copy.deepcopy(tiny_model)
    resumed = Optimizer(resumed_model, config)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    step(tiny_model, first, seed=2)
    step(resumed_model, resumed, seed=2)
    for expected, found in zip(tiny_model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_zero_grad_frees_the_gradients_of_all_parameters(tiny_model, train_config):
    optimizer = Optimizer(tiny_model, train_config(optimizer="muon"))
    for parameter in tiny_model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
