import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from gpt2.config import DTYPES, GPTConfig
from gpt2.errors import UserError
from gpt2.inference import quantization
from gpt2.inference.engine import Engine, generate
from gpt2.inference.quantization import AUTO_DTYPES, fastest_dtype, quantize, seconds_per_token
from gpt2.inference.request import Request
from gpt2.kernels import linear as kernels
from gpt2.kernels.linear import InferenceLinear
from gpt2.kernels.weights import LinearWeights
from gpt2.model.transformer import GPT
from tests.conftest import ROOT


@pytest.fixture(params=[True, False], ids=["8-bit products", "8-bit weights only"])
def exact(request, monkeypatch):
    if request.param and not kernels.has_exact_int8_matmul():
        pytest.skip("this CPU has no exact 8-bit products")
    monkeypatch.setattr(kernels, "has_exact_int8_matmul", lambda: request.param)
    return request.param


def int8_linear(layer, out_dtype=torch.float32):
    return InferenceLinear(LinearWeights.of(layer, "int8"), out_dtype)


@pytest.mark.parametrize("shape", [(48, 96), (256, 64), (64, 256), (50257, 32)])
@pytest.mark.parametrize("lead", [(1,), (5,), (1, 1), (2, 20)])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_is_close_to_the_layer(exact, shape, lead, bias):
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=bias)
    x = torch.randn(*lead, shape[1])
    y, expected = int8_linear(layer)(x), layer(x)
    assert y.shape == expected.shape
    assert y.dtype == torch.float32
    assert (y - expected).norm() / expected.norm() < 0.02


def test_int8_is_exact_where_nothing_is_rounded(exact):
    layer = nn.Linear(64, 32, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-127, 128, (32, 64)).float())
        layer.weight[:, 0] = 127  # the scale of each row is 1
    x = torch.randint(-127, 128, (3, 64)).float()
    x[:, 0] = 127
    expected = x @ layer.weight.T
    assert torch.allclose(int8_linear(layer)(x), expected, rtol=1e-6 if exact else 1e-2, atol=0 if exact else 100)


def test_int8_returns_the_requested_dtype(exact):
    layer, x = nn.Linear(16, 8), torch.randn(2, 16)
    y = int8_linear(layer, torch.bfloat16)(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, int8_linear(layer)(x).bfloat16())
    assert int8_linear(layer)(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("instructions", ["AVX2_VNNI", "AVX512_CORE_VNNI", "ALL"])
def test_int8_runs_on_a_fast_kernel_with_and_without_amx(instructions):
    program = """
import torch
from gpt2.kernels import linear as kernels
from gpt2.kernels.weights import LinearWeights
print("exact:", kernels.has_exact_int8_matmul())
if kernels.has_exact_int8_matmul():
    for shape in (768, 768), (256, 256):
        layer = kernels.Int8Prepacked(LinearWeights.of(torch.nn.Linear(*shape), "int8"))
        for rows in 1, 2, 64:
            layer(torch.randn(rows, shape[0]))
"""
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "ONEDNN_VERBOSE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=True)
    # onednn_verbose,v1,primitive,exec,cpu,matmul,IMPLEMENTATION,...
    lines = [line.split(",") for line in done.stdout.splitlines() if ",exec," in line and "matmul," in line]
    if "exact: True" not in done.stdout.splitlines():
        pytest.skip("this CPU has no exact 8-bit products under this limit")
    assert len(lines) >= 6
    assert not [line for line in lines if any(part.startswith("ref") for part in line)]


def test_int8_handles_rows_of_zeros_and_very_large_values(exact):
    layer = nn.Linear(16, 8)
    with torch.no_grad():
        layer.weight[0] = 0
    x = torch.zeros(3, 16)
    x[1] = 1e30
    x[2] = 1e-42
    y = int8_linear(layer)(x)
    assert torch.isfinite(y).all()
    assert torch.allclose(y[0], layer.bias, atol=1e-6)
    assert torch.allclose(y[:, 0], layer.bias[0], atol=1e-6)


def test_a_row_does_not_depend_on_the_others():
    layer = int8_linear(nn.Linear(256, 80))
    x = torch.randn(9, 256) * torch.logspace(-3, 3, 9)[:, None]
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


def test_non_finite_inputs_give_non_finite_outputs():
    y = int8_linear(nn.Linear(16, 8))(torch.tensor([[torch.nan] + [1.0] * 15, [torch.inf] + [1.0] * 15]))
    assert not torch.isfinite(y).any()


@pytest.mark.parametrize("attention", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "tolerance"), [("fp32", 1e-5), ("bf16", 0.02), ("int8", 0.05)])
def test_a_quantized_model_has_almost_the_same_logits(tiny_model, name, tolerance, attention, monkeypatch):
    monkeypatch.setattr(quantization, "attention_dtype", lambda: attention)
    idx = torch.randint(50257, (2, 20))
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    expected = tiny_model(idx)[0]
    found = quantize(tiny_model, name)(idx)[0].float()
    assert (found - expected).norm() / expected.norm() < tolerance
    after = tiny_model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(tiny_model(idx)[0], expected)


def test_fp32_shares_the_weights(tiny_model):
    quantized = quantize(tiny_model, "fp32")
    assert quantized.lm_head.weights.weight.data_ptr() == tiny_model.lm_head.weight.data_ptr()


def test_bf16_holds_the_tied_weights_once(tiny_model):
    quantized = quantize(tiny_model, "bf16")
    embedding = quantized.transformer["wte"].weight
    assert embedding.dtype == torch.bfloat16
    assert embedding.data_ptr() == quantized.lm_head.weights.weight.data_ptr()


def test_unknown_dtypes_are_refused(tiny_model):
    with pytest.raises(UserError, match="no dtype 'int3'"):
        quantize(tiny_model, "int3")
    with pytest.raises(UserError, match="int4 needs an n_embd that is a multiple of 64, not 16; use int8"):
        quantize(tiny_model, "int4")
    with pytest.raises(UserError, match="int8 runs only on the CPU"):
        quantize(tiny_model.to("meta"), "int8")


def test_the_fastest_dtype_is_chosen(tiny_model, monkeypatch):
    monkeypatch.setattr(quantization, "seconds_per_token", lambda model, among: {n: ord(n[0]) for n in among})
    assert fastest_dtype(tiny_model) == "bf16"
    assert fastest_dtype(tiny_model, ("fp32", "int8")) == "fp32"


def test_every_dtype_is_measured_and_the_model_is_unchanged():
    model = GPT(GPTConfig(block_size=8, vocab_size=50257, n_layer=3, n_head=2, n_embd=32))
    seconds = seconds_per_token(model)
    assert tuple(seconds) == AUTO_DTYPES
    assert all(0 < s < 1 for s in seconds.values())
    assert len(model.transformer["h"]) == 3
    assert isinstance(model.lm_head, nn.Module)


def test_a_padded_vocabulary_works_in_every_dtype():
    model = GPT(GPTConfig(block_size=16, vocab_size=50304, n_layer=1, n_head=2, n_embd=128))
    for name in DTYPES:
        (tokens,) = generate(Engine(quantize(model, name)), [Request([1], 20)])
        assert all(token.id < 50257 for token in tokens)
