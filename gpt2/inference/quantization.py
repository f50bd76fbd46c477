"""The number formats that a model can write in: fp32, bf16, and int8.

Writing a token reads every weight once, so that on a CPU the bytes of the weights decide the speed. After them come the
calls themselves, hundreds for a token: here the layers are plain callables, as those of nn.Module take a tenth of it.
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
"""Inputs are unsigned, around this: signed ones have fast products only on CPUs with AMX."""
PROBE_PARAMETERS = 64_000_000
PROBE_SECONDS = 0.25  # for each format
FEW_ROWS = 16


class CastLinear:
    """A linear layer in fp32 or bf16: (..., in_features) to (..., out_features)."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        """Takes over the weights of a layer."""
        self.weight = linear.weight.detach().to(dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.out_dtype = dtype
        self.is_slow_for_a_row = dtype == torch.bfloat16 and self.weight.device.type == "cpu"

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        x = x.to(self.weight.dtype)
        if self.is_slow_for_a_row and x.numel() == x.size(-1):  # the product with a vector takes two thirds of the time
            y = self.weight.mv(x.view(-1)).view(*x.shape[:-1], -1)
            return y if self.bias is None else y.add_(self.bias)
        return F.linear(x, self.weight, self.bias)


class InferenceLayerNorm:
    """A LayerNorm, (..., C) to (..., C)."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        """Takes over the weights of a layer."""
        self.weight, self.bias, self.shape = norm.weight.detach(), norm.bias.detach(), norm.normalized_shape

    def __call__(self, x: Tensor) -> Tensor:
        """The normalised x."""
        return torch.layer_norm(x, self.shape, self.weight, self.bias)


class Int8Linear:
    """A linear layer that multiplies 8-bit integers: (..., in_features) to (..., out_features).

    Each output channel of the weights and each row of the input has its own scale, max|v| / 127: the vector-wise
    quantisation of LLM.int8(), https://arxiv.org/abs/2208.07339, section 3.1, without its outlier columns. Sums of
    integers are exact, so a row comes out the same to the bit whatever rows are computed beside it.

    Where the CPU has no exact 8-bit products, only the weights are 8-bit, and the input is bf16.
    """

    def __init__(self, linear: nn.Linear, out_dtype: torch.dtype = torch.float32) -> None:
        """Takes over the weights of a layer."""
        self.out_dtype = out_dtype
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / INT8_MAX
        rounded = (weight / scale[:, None]).round_().to(torch.int8)
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.is_exact = has_exact_int8_matmul()
        # the 127 that the input is multiplied by goes into the weights' scale
        self.scale = scale / INT8_MAX if self.is_exact else scale.bfloat16()
        self.zero = torch.tensor(UINT8_ZERO + 0.5)  # with a half, so that cutting off rounds
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
    """Whether this CPU and this torch multiply 8-bit integers exactly, at the largest values too.

    Those without VNNI add up pairs of products in 16 bits, where they saturate.
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
    """The format of attention beside int8: it reads keys and values of half the size where the CPU computes in bf16."""
    return choose_precision(torch.device("cpu"), "auto")


def quantize(model: GPT, name: str) -> GPT:
    """A copy of the model to write with, in a format: "fp32", "bf16" or "int8".

    LayerNorm and the residual stream are fp32, as is the embedding but for bf16; what stays as it is, is shared.
    Attention beside int8 is bf16 where that is faster. The copy can neither be trained nor saved. Raises UserError for
    int8 off the CPU.
    """
    if name not in DTYPES:
        raise UserError(f"no number format {name!r}; there are: {', '.join(DTYPES)}")
    if name == "int8" and model.device.type != "cpu":
        raise UserError(f"int8 is for the CPU; on {model.device.type} use bf16 or fp32")
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    writer = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for module in list(writer.modules()):
        for child_name, child in list(module.named_children()):
            plain: Any = child
            if isinstance(child, Linear):
                if name != "int8":
                    plain = CastLinear(child, dtype)
                else:
                    plain = Int8Linear(child, attention_dtype() if child_name == "c_attn" else torch.float32)
            elif isinstance(child, nn.LayerNorm):
                plain = InferenceLayerNorm(child)
            elif isinstance(child, nn.Embedding) and name == "bf16":
                child.weight = nn.Parameter(child.weight.detach().to(dtype), requires_grad=False)
            if not isinstance(module, nn.ModuleDict | nn.ModuleList):
                if plain is not child:
                    delattr(module, child_name)
                vars(module)[child_name] = plain  # found at once, rather than by nn.Module.__getattr__
    return writer


def fastest_dtype(model: GPT, among: tuple[str, ...] = DTYPES) -> str:
    """The format among these in which this machine writes a token fastest, by a measurement of about a second.

    On CUDA it is bf16, or fp32 where the hardware has none; on MPS fp32.
    """
    if model.device.type != "cpu":
        has_bf16 = model.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp32"
    seconds = seconds_per_token(model, among)
    return min(seconds, key=lambda name: seconds[name])


@torch.inference_mode()
def seconds_per_token(model: GPT, among: tuple[str, ...] = DTYPES) -> dict[str, float]:
    """Seconds that the linear layers and the rest but attention need for one token, in each format.

    Of a model with many parameters the first blocks are measured, and the head.
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
        if round_:  # the first one sets up
            best_blocks, best_head = min(best_blocks, middle_s - start_s), min(best_head, end_s - middle_s)
            if end_s > deadline_s:
                break
    return best_blocks * blocks_ratio + best_head
