"""Models for inference in fp32, bf16 or int8 (quantized), and which of them is fastest on this machine.

Decoding a token reads every weight once, so on a CPU the size of the weights limits the speed. Call overhead is next,
with hundreds of calls per token: these layers are plain callables, because calling nn.Module takes a tenth of the time.
"""

import copy
import math
import time
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.config import DTYPES
from gpt2.device import choose_precision
from gpt2.errors import UserError
from gpt2.model.transformer import GPT, Linear

INT8_MAX = 127
UINT8_ZERO = 128
"""Zero point of the inputs, which are unsigned: signed inputs have fast kernels only on CPUs with AMX."""
PROBE_PARAMETERS = 64_000_000
PROBE_SECONDS = 0.25  # per dtype
FEW_ROWS = 16


class CastLinear:
    """A linear layer in fp32 or bf16: (..., in_features) to (..., out_features)."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        """Copies or casts the weights of a layer."""
        self.weight = linear.weight.detach().to(dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.out_dtype = dtype
        self.uses_mv = dtype == torch.bfloat16 and self.weight.device.type == "cpu"

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        x = x.to(self.weight.dtype)
        if self.uses_mv and x.numel() == x.size(-1):  # mv takes two thirds of the time of F.linear
            y = self.weight.mv(x.view(-1)).view(*x.shape[:-1], -1)
            return y if self.bias is None else y.add_(self.bias)
        return F.linear(x, self.weight, self.bias)


class InferenceLayerNorm:
    """A LayerNorm, (..., C) to (..., C)."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        """Copies or casts the weights of a layer."""
        self.weight, self.bias, self.shape = norm.weight.detach(), norm.bias.detach(), norm.normalized_shape

    def __call__(self, x: Tensor) -> Tensor:
        """The normalised x."""
        return torch.layer_norm(x, self.shape, self.weight, self.bias)


class Int8Linear:
    """A linear layer that multiplies 8-bit integers: (..., in_features) to (..., out_features).

    Each output channel of the weights and each row of the input has its own scale, max|v| / 127: the vector-wise
    quantisation of LLM.int8(), https://arxiv.org/abs/2208.07339, section 3.1, without its outlier columns. Integer
    sums are exact, so the result of a row is bitwise independent of the other rows in the batch.

    On CPUs without exact 8-bit products only the weights are 8-bit, and the input is bf16.
    """

    def __init__(self, linear: nn.Linear, out_dtype: torch.dtype = torch.float32) -> None:
        """Copies or casts the weights of a layer."""
        self.out_dtype = out_dtype
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / INT8_MAX
        rounded = (weight / scale[:, None]).round_().to(torch.int8)
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.is_exact = has_exact_int8_matmul()
        # includes the factor 127 of the input scale
        self.scale = scale / INT8_MAX if self.is_exact else scale.bfloat16()
        self.zero = torch.tensor(UINT8_ZERO + 0.5)  # the half makes truncation round
        self.zeros = torch.zeros(len(scale), dtype=torch.long)
        self.weight = torch.ops.onednn.qlinear_prepack(rounded, None) if self.is_exact else rounded

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        x = x.float()
        if not self.is_exact:
            return self._weight_only(x).to(self.out_dtype)
        largest = x.abs().amax(-1, True)
        q = torch.addcdiv(self.zero, x, largest, value=INT8_MAX).to(torch.uint8)
        y: Tensor = _QLINEAR(
            q, 1.0, UINT8_ZERO, self.weight, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y = y.mul_(largest) if self.bias is None else torch.addcmul(self.bias, y, largest)
        return y.to(self.out_dtype)

    def _weight_only(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        if len(rows) <= FEW_ROWS:
            y = torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale).float()
        else:
            y = F.linear(rows, self.weight.float()).mul_(self.scale.float())
        if self.bias is not None:
            y.add_(self.bias)
        return cast(Tensor, y.view(*x.shape[:-1], -1))


_QLINEAR: Any = torch.ops.onednn.qlinear_pointwise.default if hasattr(torch.ops.onednn, "qlinear_pointwise") else None


@cache
def has_exact_int8_matmul() -> bool:
    """Whether 8-bit products are exact with this CPU and this torch, also at the largest values.

    CPUs without VNNI add pairs of products in 16 bits, which saturates.
    """
    rows, ones, zeros = torch.full((2, 192), INT8_MAX), torch.ones(32), torch.zeros(32).long()
    rows[1] *= -1
    rows = (rows + UINT8_ZERO).to(torch.uint8)
    try:
        packed = torch.ops.onednn.qlinear_prepack(torch.full((32, 192), INT8_MAX, dtype=torch.int8), None)
        found = _QLINEAR(rows, 1.0, UINT8_ZERO, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    expected = 192.0 * INT8_MAX**2 * torch.tensor([[1.0], [-1.0]]).expand(2, 32)
    return bool(torch.equal(found, expected))


@cache
def attention_dtype() -> torch.dtype:
    """The dtype of attention in an int8 model: bf16, with half the KV cache, where the CPU is faster in bf16."""
    return choose_precision(torch.device("cpu"), "auto")


def quantize(model: GPT, name: str) -> GPT:
    """A copy of the model for inference in "fp32", "bf16" or "int8".

    LayerNorm and the residual stream stay fp32; the embedding too, except in bf16. Unchanged weights are shared with
    `model`. In int8, attention is bf16 where that is faster. The copy cannot be trained or saved. Raises UserError for
    an unknown dtype, and for int8 on a device other than the CPU.
    """
    if name not in DTYPES:
        raise UserError(f"no dtype {name!r}; available: {', '.join(DTYPES)}")
    if name == "int8" and model.device.type != "cpu":
        raise UserError(f"int8 runs only on the CPU; on {model.device.type} use bf16 or fp32")
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    quantized = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for module in list(quantized.modules()):
        for child_name, child in list(module.named_children()):
            layer: Any = child
            if isinstance(child, Linear):
                if name != "int8":
                    layer = CastLinear(child, dtype)
                else:
                    layer = Int8Linear(child, attention_dtype() if child_name == "c_attn" else torch.float32)
            elif isinstance(child, nn.LayerNorm):
                layer = InferenceLayerNorm(child)
            elif isinstance(child, nn.Embedding) and name == "bf16":
                child.weight = nn.Parameter(child.weight.detach().to(dtype), requires_grad=False)
            if not isinstance(module, nn.ModuleDict | nn.ModuleList):
                if layer is not child:
                    delattr(module, child_name)
                vars(module)[child_name] = layer  # avoids nn.Module.__getattr__
    return quantized


def fastest_dtype(model: GPT, among: tuple[str, ...] = DTYPES) -> str:
    """The dtype in `among` that decodes fastest on this machine, by a measurement of about a second.

    On CUDA: bf16, or fp32 without hardware support. On MPS: fp32.
    """
    if model.device.type != "cpu":
        has_bf16 = model.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp32"
    seconds = seconds_per_token(model, among)
    return min(seconds, key=lambda name: seconds[name])


@torch.inference_mode()
def seconds_per_token(model: GPT, among: tuple[str, ...] = DTYPES) -> dict[str, float]:
    """Seconds per decoded token in each dtype, without attention.

    For large models only the first blocks and the head are measured.
    """
    blocks: Any = model.transformer["h"]
    block_parameters = sum(p.numel() for p in blocks[0].parameters())
    probe = copy.copy(model)
    probe._modules = dict(model._modules)
    kept = max(1, min(len(blocks), PROBE_PARAMETERS // block_parameters))
    probe.transformer = nn.ModuleDict({**model.transformer, "h": nn.ModuleList(list(blocks)[:kept])})
    return {name: _time_token(quantize(probe, name), len(blocks) / kept) for name in among}


def _time_token(model: GPT, blocks_ratio: float) -> float:
    token = torch.zeros(1, 1, dtype=torch.long)
    best_blocks, best_head, deadline_s = math.inf, math.inf, time.perf_counter() + PROBE_SECONDS
    for round_ in range(50):
        start_s = time.perf_counter()
        hidden = model.hidden(token)
        middle_s = time.perf_counter()
        model.lm_head(hidden)
        end_s = time.perf_counter()
        if round_:  # the first round warms up
            best_blocks, best_head = min(best_blocks, middle_s - start_s), min(best_head, end_s - middle_s)
            if end_s > deadline_s:
                break
    return best_blocks * blocks_ratio + best_head
