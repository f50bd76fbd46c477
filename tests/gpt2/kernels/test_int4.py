import pytest
import torch

from gpt2.kernels.int4 import GROUPS, INVERSE_SCALES, dequantize_int4, pack, quantize_int4, unpack


def squared_errors(weight, found, group):
    """(out, in / group)."""
    return (weight - found).square().unflatten(1, (-1, group)).sum(2)


def dequantized(weight, group):
    return dequantize_int4(*quantize_int4(weight, group))[: len(weight)]


def test_each_number_is_where_the_kernel_reads_it():
    numbers = torch.zeros(32, 16, dtype=torch.uint8)
    numbers[17, 2], numbers[17, 4 + 3], numbers[17, 8], numbers[2, 15] = 5, 12, 1, 2
    packed = pack(numbers)
    assert packed.shape == (2, 2, 16, 4)
    assert packed.dtype == torch.uint8
    expected = torch.zeros(2, 2, 16, 4, dtype=torch.uint8)
    expected[1, 0, 1, 2], expected[1, 0, 1, 3], expected[1, 1, 1, 0], expected[0, 1, 2, 3] = 5, 16 * 12, 1, 16 * 2
    assert torch.equal(packed, expected)


def test_unpacking_returns_what_was_packed():
    numbers = torch.randint(16, (48, 128), dtype=torch.uint8)
    assert torch.equal(unpack(pack(numbers)), numbers)
    every_byte = torch.arange(256, dtype=torch.uint8).view(1, 4, 16, 4)
    assert torch.equal(pack(unpack(every_byte)), every_byte)


def test_a_small_weight_is_stored_as_documented():
    weight = torch.zeros(1, 64)
    weight[0, :5] = torch.tensor([-8.0, 7.0, 1.0, -3.0, 2.0])
    weight[0, 40] = 4.0  # in a group of its own
    packed, scales = quantize_int4(weight, 32)
    assert scales.shape == (1, 2, 16)
    assert scales[0, :, 0].tolist() == [1.0, -0.5]
    assert (scales[:, :, 1:] == 0).all()  # padding
    assert packed.shape == (1, 8, 16, 4)
    assert packed[0, 0, 0].tolist() == [0 + 16 * 10, 15 + 16 * 8, 9 + 16 * 8, 5 + 16 * 8]
    assert packed[0, 5, 0, 0] == 0 + 16 * 8
    assert torch.equal(dequantized(weight, 32), weight)


@pytest.mark.parametrize("group", GROUPS)
def test_weights_of_the_grid_are_kept_exactly(group):
    numbers = torch.randint(-8, 8, (9, 256)).float()
    numbers[:, ::group] = -8.0
    steps = torch.tensor([-0.25, 0.5, 2.0]).repeat(3)[:, None]
    weight = numbers * steps
    scales = quantize_int4(weight, group)[1][0, :, :9]
    assert scales.shape == (256 // group, 9)
    assert torch.equal(dequantized(weight, group), weight)
    assert torch.equal(scales, steps.T.expand_as(scales))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_bounded(group, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(300, 512) * torch.logspace(-4, 4, 300)[:, None]).to(dtype)
    weight[:, 7] *= 10  # outliers
    scales = quantize_int4(weight, group)[1]
    error = (weight.float() - dequantized(weight, group)).unflatten(1, (-1, group))
    scales = scales.transpose(1, 2).flatten(0, 1)[:300]
    largest = weight.float().unflatten(1, (-1, group)).abs().amax(2)
    # half a step; more for what is clipped at 7, and as the step is fitted after rounding
    assert (error.abs().amax(2) <= 0.2 * largest).all()
    relative = weight.float().unflatten(1, (-1, group)) / scales[:, :, None]
    inside = (relative > -7.5) & (relative < 6.5)
    assert (error.abs() <= 0.75 * scales.abs()[:, :, None])[inside].all()
    assert dequantize_int4(*quantize_int4(weight, group), dtype).dtype == dtype


@pytest.mark.parametrize("group", GROUPS)
def test_the_squared_error_is_at_most_that_of_rounding_to_the_nearest(group):
    torch.manual_seed(0)
    weight = torch.randn(400, 256)
    found = squared_errors(weight, dequantized(weight, group), group)
    groups = weight.unflatten(1, (-1, group))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    for step in (largest / 7, largest / -8):
        nearest = ((groups / step).round().clamp(-8, 7) * step).flatten(1)
        expected = squared_errors(weight, nearest, group)
        assert (found <= expected * 1.0001).all()
        assert found.sum() < 0.97 * expected.sum()


def test_unusual_rows_stay_finite():
    weight = torch.zeros(9, 128)
    weight[1] = 0.3
    weight[2] = -0.3
    weight[3, 5] = 1e38
    weight[4] = torch.linspace(-1e38, 1e38, 128)
    weight[5, 9] = 1e-45  # the smallest number
    weight[6] = torch.linspace(-1e-40, 1e-40, 128)
    weight[7, ::2], weight[7, 1::2] = 1.0, -1.0
    weight[8] = -1e-30
    packed, scales = quantize_int4(weight, 32)
    found = dequantized(weight, 32)
    assert torch.isfinite(scales).all()
    assert torch.isfinite(found).all()
    assert (found[0] == 0).all()
    assert (unpack(packed)[0] == 8).all()
    for row in 1, 2, 3, 8:
        assert torch.allclose(found[row], weight[row], rtol=1e-6, atol=0)
    assert ((found - weight).abs().amax(1) <= 0.15 * weight.abs().amax(1) + 1e-44).all()


def test_a_row_does_not_depend_on_the_others():
    torch.manual_seed(0)
    weight = torch.randn(2500, 128)  # more than are quantized at once
    found = dequantized(weight, 32)
    for row in 0, 2047, 2048, 2499:
        assert torch.equal(dequantized(weight[row : row + 1], 32)[0], found[row])


def test_the_scales_of_both_roundings_are_tried():
    assert {-8.0, -7.0} <= set(INVERSE_SCALES)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="multiple of 64"):
        quantize_int4(torch.zeros(4, 96), 64)
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_int4(torch.zeros(128), 32)
    with pytest.raises(ValueError, match="not 48"):
        quantize_int4(torch.zeros(4, 128), 48)
