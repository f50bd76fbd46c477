import pytest
import torch

from gpt2.config import GPTConfig
from gpt2.inference.quantization import quantize
from gpt2.kernels.calibration import EXAMPLES, example_inputs
from gpt2.model.transformer import GPT, Linear


def make(block_size=32):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=block_size, vocab_size=97, n_layer=2, n_head=2, n_embd=128))


@pytest.mark.parametrize("block_size", [1, 48, 256])
def test_each_layer_of_the_blocks_has_examples(block_size):
    model = make(block_size)
    found = example_inputs(model)
    layers = [module for module in model.modules() if isinstance(module, Linear) and module is not model.lm_head]
    assert {id(weight) for weight in found} == {id(layer.weight) for layer in layers}
    assert all(found[layer.weight].shape == (EXAMPLES, layer.in_features) for layer in layers)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_they_are_the_same_each_time_and_leave_the_random_numbers_alone():
    model = make()
    state = torch.get_rng_state()
    first, second = example_inputs(model), example_inputs(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[weight], second[weight]) for weight in first)


def test_a_damaged_model_has_none():
    for damage in (torch.nan, torch.inf):
        model = make()
        with torch.no_grad():
            model.transformer["h"][1].ln_2.weight[3] = damage
        assert example_inputs(model) == {}


def test_a_4_bit_model_is_nearer_to_the_original_with_them(monkeypatch):
    model = make()
    with torch.no_grad():
        for parameter in model.transformer["h"].parameters():
            parameter.mul_(4)
    ids = torch.randint(97, (20, 32))
    expected = model(ids)[0].log_softmax(2)
    errors = [(quantize(model, "int4")(ids)[0].log_softmax(2) - expected).norm()]
    monkeypatch.setattr("gpt2.inference.quantization.example_inputs", lambda model: {})
    errors.append((quantize(model, "int4")(ids)[0].log_softmax(2) - expected).norm())
    assert errors[0] < 0.9 * errors[1]
