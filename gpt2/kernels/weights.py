"""Weights of a linear layer in fp32, bf16, 8 bits or 4 bits, in the layout that the compiled kernels read."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpt2.kernels.blocks import CHANNELS, INPUTS, from_blocks, to_blocks
from gpt2.kernels.int4 import ZERO, dequantize_int4, quantize_int4, unpack

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

    shape: (out, in). weight: (out, in) in fp32 or bf16; in blocks in int8 and int4 (`gpt2.kernels.blocks`,
    `quantize_int4`). scale: fp32; in int8 one for each output channel, (out,); in int4 one for each group of inputs,
    (blocks, in / group, 16). bias: (out,), fp32.
    """

    dtype: str
    shape: tuple[int, int]
    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, linear: nn.Linear, dtype: str, inputs: Tensor | None = None) -> "LinearWeights":
        """The weights of a layer in a dtype. In fp32 they are shared with the layer.

        inputs: example inputs, (N, in), with which 4 bits lose less.
        """
        weight = linear.weight.detach()
        shape = (linear.out_features, linear.in_features)
        bias = None if linear.bias is None else linear.bias.detach().float()
        if dtype in ("fp32", "bf16"):
            cast = weight.to(torch.float32 if dtype == "fp32" else torch.bfloat16).contiguous()
            return cls(dtype, shape, cast, None, bias)
        if dtype == "int4":
            packed, scale = quantize_int4(weight, INT4_GROUP, inputs)
            return cls(dtype, shape, packed, scale, bias)
        quantized, scale = quantize_int8(weight)
        return cls(dtype, shape, to_blocks(quantized), scale, bias)

    @classmethod
    def constant(cls, linear: nn.Linear, dtype: str) -> "LinearWeights":
        """Weights of the same sizes, for measurements: how long a product takes does not depend on its values."""
        shape = (linear.out_features, linear.in_features)
        bias = None if linear.bias is None else torch.zeros(shape[0])
        blocks, words = -(-shape[0] // CHANNELS), -(-shape[1] // INPUTS)
        if dtype in ("fp32", "bf16"):
            return cls(
                dtype, shape, torch.ones(shape, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16), None, bias
            )
        if dtype == "int4":
            packed = torch.full((blocks, words // 2, CHANNELS, INPUTS), ZERO + 1 + ZERO * 16, dtype=torch.uint8)
            return cls(dtype, shape, packed, torch.ones(blocks, shape[1] // INT4_GROUP, CHANNELS), bias)
        return cls(
            dtype, shape, torch.ones(blocks, words, CHANNELS, INPUTS, dtype=torch.int8), torch.ones(shape[0]), bias
        )

    def numbers(self) -> Tensor:
        """What int8 and int4 weights are stored as, without their scales: int8, (out, in)."""
        out, width = self.shape
        rows = unpack(self.weight).to(torch.int8) - ZERO if self.dtype == "int4" else from_blocks(self.weight)
        return rows[:out, :width].contiguous()

    def group_scales(self) -> Tensor:
        """The scales of int4 weights by output channel, (out, in / group)."""
        assert self.scale is not None
        return self.scale.transpose(1, 2).flatten(0, 1)[: self.shape[0]]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as numbers of a dtype, (out, in)."""
        if self.scale is None:
            return self.weight.to(dtype)
        if self.dtype == "int4":
            return dequantize_int4(self.weight, self.scale, dtype)[: self.shape[0]]
        return (self.numbers() * self.scale[:, None]).to(dtype)
