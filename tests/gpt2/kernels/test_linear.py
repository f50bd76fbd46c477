import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpt2.config import DTYPES
from gpt2.kernels import linear
from gpt2.kernels.linear import CANDIDATES, InferenceLinear, choose_kernels, make_kernel
from gpt2.kernels.weights import LinearWeights

EVERY = [(dtype, kind.__name__) for dtype, kinds in CANDIDATES.items() for kind in kinds]


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return [InferenceLinear(LinearWeights.of(nn.Linear(128, 64), "fp32"), torch.float32) for _ in range(2)]


@pytest.fixture
def measuring(tmp_path, monkeypatch):
    """Kernels by name take these seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seconds = {"Plain": 2.0, "MatrixVector": 1.0, "Prepacked": 3.0}
    calls = []

    def measure(kernels, x):
        calls.append(type(kernels[0]).__name__)
        return seconds[calls[-1]]

    monkeypatch.setattr(linear, "_seconds", measure)
    return seconds, calls


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "name"), EVERY)
def test_each_kernel_computes_the_product_of_its_weights(dtype, name, bias, rows):
    torch.manual_seed(0)
    weights = LinearWeights.of(nn.Linear(256, 80, bias=bias), dtype)
    kernel = make_kernel(name, weights)
    if kernel is None:
        pytest.skip(f"{name} does not work on this CPU")
    x = torch.randn(rows, 256)
    expected = F.linear(x, weights.dequantized(), weights.bias)
    found = kernel(x).float()
    assert found.shape == expected.shape
    assert (found - expected).norm() / expected.norm() < (1e-5 if dtype == "fp32" else 0.02)


def test_the_fastest_kernel_is_used_and_kept(layers, measuring):
    seconds, calls = measuring
    choose_kernels(layers, [1, 8])
    assert {type(layer.kernel).__name__ for layer in layers} == {"MatrixVector"}
    measured = len(calls)
    assert measured > 0
    choose_kernels(layers, [1, 8])
    assert len(calls) == measured
    seconds["Prepacked"] = 0.5
    choose_kernels(layers, [1])  # another question
    if make_kernel("Prepacked", layers[0].weights) is not None:
        assert {type(layer.kernel).__name__ for layer in layers} == {"Prepacked"}


def test_a_released_kernel_comes_back_as_the_same_one():
    layer = InferenceLinear(LinearWeights.of(nn.Linear(128, 64), "fp32"), torch.float32)
    layer.use("MatrixVector")
    first = layer.kernel
    assert layer.kernel is first
    layer.release()
    assert type(layer.kernel).__name__ == "MatrixVector"
    assert layer.kernel is not first


def test_a_kernel_that_does_not_work_is_replaced_by_one_that_does(monkeypatch):
    monkeypatch.setattr(linear, "_MKLDNN", object())
    layer = InferenceLinear(LinearWeights.of(nn.Linear(128, 64), "fp32"), torch.float32)
    layer.use("Prepacked")
    assert type(layer.kernel).__name__ == "Plain"


def test_another_limit_of_the_instruction_sets_is_measured_again(layers, measuring, monkeypatch):
    _, calls = measuring
    choose_kernels(layers, [1])
    measured = len(calls)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    choose_kernels(layers, [1])
    assert len(calls) == 2 * measured


def test_an_operator_that_is_missing_is_no_candidate(layers, measuring, monkeypatch):
    measuring[0]["Prepacked"] = 0.5
    monkeypatch.setattr(linear, "_MKLDNN", object())
    assert make_kernel("Prepacked", layers[0].weights) is None
    choose_kernels(layers, [1])
    assert {type(layer.kernel).__name__ for layer in layers} == {"MatrixVector"}


def test_if_no_kernel_works_the_error_is_the_first_ones(monkeypatch):
    def out_of_memory(self, weights):
        raise RuntimeError("can't allocate memory")

    for kind in CANDIDATES["fp32"]:
        monkeypatch.setattr(kind, "__init__", out_of_memory)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        InferenceLinear(LinearWeights.of(nn.Linear(64, 64), "fp32"), torch.float32)(torch.zeros(1, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_weights_for_measurements_have_the_sizes_of_real_ones(dtype, bias):
    layer = torch.nn.Linear(128, 97, bias=bias)
    real, constant = LinearWeights.of(layer, dtype), LinearWeights.constant(layer, dtype)
    assert constant.shape == real.shape == (97, 128)
    for found, expected in ((getattr(constant, name), getattr(real, name)) for name in ("weight", "scale", "bias")):
        assert (found is None) == (expected is None)
        if found is not None:
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.isfinite(constant.dequantized()).all()
