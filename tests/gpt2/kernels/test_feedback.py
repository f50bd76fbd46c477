import pytest
import torch

from gpt2.kernels import feedback
from gpt2.kernels.int4 import dequantize_int4, quantize_int4


def correlated(rows, width):
    torch.manual_seed(1)
    mixed = torch.randn(width // 8, width)
    return torch.randn(rows, width // 8) @ mixed + 0.1 * torch.randn(rows, width)


def found(weight, inputs, group=64):
    return dequantize_int4(*quantize_int4(weight, group, inputs))[: len(weight)]


@pytest.mark.parametrize("group", [32, 64, 128])
def test_outputs_of_other_inputs_are_nearer(group):
    inputs = correlated(1128, 384)
    weight = torch.randn(80, 384)
    errors = [
        ((found(weight, examples, group) - weight) @ inputs[128:].T).square().mean()
        for examples in (None, inputs[:128])
    ]
    assert errors[1] < 0.4 * errors[0]


def test_without_an_effect_on_the_outputs_each_weight_is_rounded_to_the_nearest():
    torch.manual_seed(0)
    weight = torch.randn(48, 256)
    groups = weight.unflatten(1, (-1, 64))
    step = groups.gather(2, groups.abs().argmax(2, keepdim=True)) / -8
    nearest = ((groups / step).round().clamp(-8, 7) * step).flatten(1)
    assert torch.allclose(found(weight, torch.zeros(5, 256)), nearest, atol=1e-6)


def test_weights_of_the_grid_are_kept_exactly():
    weight = torch.randint(-8, 8, (20, 256)).float()
    weight[:, ::64] = -8.0
    assert torch.equal(found(weight, correlated(30, 256)), weight)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e30])
def test_unusual_weights_and_inputs_stay_finite(factor):
    weight = torch.zeros(9, 128)
    weight[1], weight[2] = 0.3, -0.3
    weight[3, 5] = 1e38
    weight[4] = torch.linspace(-1e38, 1e38, 128)
    weight[5, 9] = 1e-45  # the smallest number
    weight[6] = torch.linspace(-1e-40, 1e-40, 128)
    weight[7, :64], weight[7, 64:] = 1e-38, 1.0
    inputs = correlated(20, 128) * factor
    inputs[:, 3] = 0
    packed, scales = quantize_int4(weight, 64, inputs)
    rounded = dequantize_int4(packed, scales)[:9]
    assert torch.isfinite(scales).all()
    assert torch.isfinite(rounded).all()
    assert (rounded[0] == 0).all()
    assert torch.allclose(rounded[3], weight[3])


def test_the_rows_that_are_rounded_at_once_decide_no_more_than_ties(monkeypatch):
    weight, inputs = torch.randn(100, 256), correlated(20, 256)
    expected = found(weight, inputs)
    monkeypatch.setattr(feedback, "CHUNK_WEIGHTS", 32 * 256)
    differs = found(weight, inputs) != expected  # sums of another order decide a tie differently
    assert differs.float().mean() < 0.01
