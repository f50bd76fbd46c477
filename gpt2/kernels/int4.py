"""4-bit weights: groups of inputs share a scale."""

import torch
from torch import Tensor

BLOCK = 128  # inputs that are packed together
ZERO = 8


def quantize_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Packed weights, (out, in / 2) uint8, and scales, (out, in / group), of a weight (out, in)."""
    out, width = weight.shape
    groups = weight.view(out, width // group, group)
    scale = (groups.abs().amax(2) / 7).clamp(min=torch.finfo(torch.float32).tiny)
    q = (groups / scale[..., None]).round_().clamp_(-8, 7).add_(ZERO).to(torch.uint8)
    halves = q.view(out, width // BLOCK, 2, BLOCK // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(out, width // 2), scale


def dequantize_int4(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights, (out, in)."""
    out, half = packed.shape
    blocks = packed.view(out, half // (BLOCK // 2), 1, BLOCK // 2)
    q = torch.cat((blocks & 15, blocks >> 4), 2).view(out, scale.size(1), -1)
    return ((q.to(torch.int8) - ZERO) * scale[..., None]).to(dtype).view(out, 2 * half)
