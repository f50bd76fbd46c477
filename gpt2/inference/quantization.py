"""Models for inference in fp32, bf16, int8 or int4 (quantized), and which of them is fastest on this machine.

Decoding a token reads every weight once, so on a CPU the size of the weights limits the speed. Call overhead is next,
with hundreds of calls per token: these layers are plain callables, because calling nn.Module takes a tenth of the time.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.config import DTYPES
from gpt2.device import choose_precision
from gpt2.errors import UserError
from gpt2.inference.kv_cache import ModelRunner
from gpt2.kernels.calibration import example_inputs
from gpt2.kernels.linear import InferenceLinear
from gpt2.kernels.weights import INT4_GROUP, LinearWeights
from gpt2.model.transformer import GPT, Linear

AUTO_DTYPES = ("fp32", "bf16", "int8")
"""What `auto` chooses from. int4 costs some loss, so it has to be measured or asked for."""
PROBE_CONTEXT = 16
PROBE_PARAMETERS = 64_000_000
PROBE_SECONDS = 0.1  # per dtype


class InferenceLayerNorm:
    """A LayerNorm, (..., C) to (..., C)."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        """Copies or casts the weights of a layer."""
        self.weight, self.bias, self.shape = norm.weight.detach(), norm.bias.detach(), norm.normalized_shape

    def __call__(self, x: Tensor) -> Tensor:
        """The normalised x."""
        return torch.layer_norm(x, self.shape, self.weight, self.bias)


@cache
def attention_dtype() -> torch.dtype:
    """The dtype of attention in an int8 or int4 model where PyTorch computes it: bf16 where the CPU is faster in it."""
    return choose_precision(torch.device("cpu"), "auto")


def quantize(model: GPT, name: str) -> GPT:
    """A copy of the model for inference in "fp32", "bf16", "int8" or "int4".

    LayerNorm and the residual stream stay fp32; the embedding too, except in bf16. Unchanged weights are shared with
    `model`. In int8 and int4, attention is bf16 where that is faster. The copy cannot be trained or saved. Raises
    UserError for an unknown dtype, for int8 and int4 on a device other than the CPU, and for int4 with an n_embd that
    is not a multiple of 64.
    """
    if name not in DTYPES:
        raise UserError(f"no dtype {name!r}; available: {', '.join(DTYPES)}")
    is_integer = name in ("int8", "int4")
    if is_integer and model.device.type != "cpu":
        raise UserError(f"{name} runs only on the CPU; on {model.device.type} use bf16 or fp32")
    if not has_dtype(model, name):
        raise UserError(f"int4 needs an n_embd that is a multiple of {INT4_GROUP}, not {model.config.n_embd}; use int8")
    inputs = example_inputs(model) if name == "int4" else {}
    return _with_weights(model, name, lambda layer, dtype: LinearWeights.of(layer, dtype, inputs.get(layer.weight)))


def _with_weights(model: GPT, name: str, weights_of: Callable[[Linear, str], LinearWeights]) -> GPT:
    is_integer = name in ("int8", "int4")
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    quantized = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for module in list(quantized.modules()):
        for child_name, child in list(module.named_children()):
            layer: Any = child
            if isinstance(child, Linear):
                out_dtype = attention_dtype() if is_integer and child_name == "c_attn" else dtype
                # 4 bits in the head cost more than in all other layers together
                dtype_name = "int8" if name == "int4" and child_name == "lm_head" else name
                layer = InferenceLinear(weights_of(child, dtype_name), out_dtype)
            elif isinstance(child, nn.LayerNorm):
                layer = InferenceLayerNorm(child)
            elif isinstance(child, nn.Embedding) and name == "bf16":
                head: Any = quantized.lm_head  # which comes first
                is_tied = child.weight is model.lm_head.weight
                cast = head.weights.weight if is_tied else child.weight.detach().to(dtype)
                child.weight = nn.Parameter(cast, requires_grad=False)
            if not isinstance(module, nn.ModuleDict | nn.ModuleList):
                if layer is not child:
                    delattr(module, child_name)
                vars(module)[child_name] = layer  # avoids nn.Module.__getattr__
    return quantized


def has_dtype(model: GPT, name: str) -> bool:
    """Whether the model's sizes allow this dtype."""
    return name != "int4" or model.config.n_embd % INT4_GROUP == 0


def fastest_dtype(model: GPT, among: tuple[str, ...] = AUTO_DTYPES) -> str:
    """The dtype in `among` that decodes fastest on this machine, by a measurement of about a second.

    On CUDA: bf16, or fp32 without hardware support. On MPS: fp32.
    """
    if model.device.type != "cpu":
        has_bf16 = model.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp32"
    seconds = seconds_per_token(model, tuple(name for name in among if has_dtype(model, name)))
    return min(seconds, key=lambda name: seconds[name])


@torch.inference_mode()
def seconds_per_token(model: GPT, among: tuple[str, ...] = AUTO_DTYPES) -> dict[str, float]:
    """Seconds per decoded token in each dtype, with the compiled kernels if they are there.

    For large models only the first blocks and the head are measured, and the time of the rest is estimated.
    """
    blocks: Any = model.transformer["h"]
    block_parameters = sum(p.numel() for p in blocks[0].parameters())
    probe = copy.copy(model)
    probe._modules = dict(model._modules)
    kept = max(1, min(len(blocks), PROBE_PARAMETERS // block_parameters))
    probe.transformer = nn.ModuleDict({**model.transformer, "h": nn.ModuleList(list(blocks)[:kept])})
    probe.config = replace(model.config, n_layer=kept)
    head = model.lm_head.weight.numel()
    ratio = (head + len(blocks) * block_parameters) / (head + kept * block_parameters)
    return {name: ratio * _time_token(_with_weights(probe, name, LinearWeights.constant)) for name in among}


def _time_token(model: GPT) -> float:
    runner = ModelRunner(model, slots=1, context_length=min(PROBE_CONTEXT, model.config.block_size))
    compiled = runner.load_compiled()
    if compiled is None:
        runner.prefill(0, [0])
    else:
        compiled.prefill(0, [0], 0)
    best_s, deadline_s = math.inf, time.perf_counter() + PROBE_SECONDS
    for round_ in range(50):
        runner.lengths[0] = 1
        start_s = time.perf_counter()
        compiled.decode([0], [0], [1]) if compiled else runner.decode([0], [0])
        end_s = time.perf_counter()
        if round_:  # the first round warms up
            best_s = min(best_s, end_s - start_s)
            if end_s > deadline_s:
                break
    return best_s
