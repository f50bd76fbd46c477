"""Weights of a linear layer in fp32, bf16, 8 bits or 4 bits, in the layout that the compiled kernels read."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpt2.kernels.int4 import dequantize_int4, quantize_int4

INT8_MAX = 127
INT4_GROUP = 64
"""By measured loss: 32 is not better within the error, and reads 6 % more bytes; 128 is worse."""


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit weights, (out, in), and scales, (out,): each output channel has its own, max|w| / 127."""
    weight = weight.float()
    scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / INT8_MAX
    return (weight / scale[:, None]).round_().to(torch.int8), scale


@dataclass(frozen=True)
class LinearWeights:
    """The weights of a linear layer.

    weight: (out, in) in fp32, bf16 or int8; 4-bit weights as `quantize_int4` packs them. scale: fp32; in int8 one for
    each output channel, (out,); in int4 one for each group of inputs, (out, in / group). bias: (out,), fp32.
    """

    dtype: str
    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, linear: nn.Linear, dtype: str) -> "LinearWeights":
        """The weights of a layer in a dtype. In fp32 they are shared with the layer."""
        weight = linear.weight.detach()
        bias = None if linear.bias is None else linear.bias.detach().float()
        if dtype in ("fp32", "bf16"):
            cast = weight.to(torch.float32 if dtype == "fp32" else torch.bfloat16).contiguous()
            return cls(dtype, cast, None, bias)
        quantized, scale = quantize_int8(weight) if dtype == "int8" else quantize_int4(weight, INT4_GROUP)
        return cls(dtype, quantized, scale, bias)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, packed = self.weight.shape
        return out, 2 * packed if self.dtype == "int4" else packed

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as numbers of a dtype, (out, in)."""
        if self.dtype == "int4":
            assert self.scale is not None
            return dequantize_int4(self.weight, self.scale, dtype)
        if self.scale is None:
            return self.weight.to(dtype)
        return (self.weight * self.scale[:, None]).to(dtype)
