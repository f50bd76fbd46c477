"""4-bit weights: their storage format, and the scales that represent a matrix best.

A weight is stored as a number from 0 to 15, which stands for (number - 8) * scale. Each group of consecutive inputs of
an output has its own scale. Scales may be negative: the weight of largest magnitude then becomes -8, which uses all
sixteen numbers, as in llama.cpp's q4_0 (https://github.com/ggml-org/ggml, quantize_row_q4_0_ref).

Inputs are packed in blocks of 128. Byte j (0 <= j < 64) of a block holds input j in its low four bits, and input 64 + j
in its high four bits, so that one mask and one shift unpack 64 neighbours each.
"""

import torch
from torch import Tensor

BLOCK = 128
GROUPS = (32, 64, 128)
ZERO = 8
LOWEST, HIGHEST = -8, 7
INVERSE_SCALES = (-8.0, -8.3, -7.7, -7.4, -7.0)
"""What the weight of largest magnitude of a group is multiplied to, before rounding. Beyond -8 it is clipped. Trying up
to -9.5 has a lower squared error, but a larger Kullback-Leibler divergence of the head with groups of 64 and 128."""
CHUNK_WEIGHTS = 1 << 18  # 1 MB in fp32; the temporaries take about ten times that


@torch.no_grad()
def quantize_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The packed numbers, (out, in / 2) uint8, and the scales, (out, in / group) fp32, of a weight (out, in).

    Of several scales, each group takes the one with the least squared error. Each is the least-squares fit of the
    weights w to the numbers n that it is tried with, sum(w n) / sum(n n), as in llama.cpp's make_qx_quants.
    Finite weights give finite scales (up to 1e38). Raises ValueError for other shapes.
    """
    if weight.dim() != 2 or weight.size(1) % BLOCK:
        raise ValueError(f"a weight has the shape (out, in), with in a multiple of {BLOCK}; not {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    if group not in GROUPS:
        raise ValueError(f"a group has {', '.join(map(str, GROUPS))} inputs, not {group}")
    packed = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(out_features, in_features // group, device=weight.device)
    rows = max(1, CHUNK_WEIGHTS // in_features)
    for start in range(0, out_features, rows):
        part = slice(start, start + rows)
        numbers, scales[part] = _quantize_groups(weight[part].float().reshape(-1, in_features // group, group))
        packed[part] = pack((numbers.flatten(1) + ZERO).to(torch.uint8))
    return packed, scales


def dequantize_int4(packed: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight, (out, in), of packed numbers, (out, in / 2), and scales, (out, in / group)."""
    numbers = unpack(packed).float().sub_(ZERO).view(*scales.shape, -1)
    return numbers.mul_(scales[:, :, None]).flatten(1).to(dtype)


def pack(numbers: Tensor) -> Tensor:
    """Numbers from 0 to 15, (out, in) uint8, as (out, in / 2) bytes."""
    halves = numbers.view(len(numbers), -1, 2, BLOCK // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def unpack(packed: Tensor) -> Tensor:
    """The numbers from 0 to 15, (out, in) uint8, in (out, in / 2) bytes."""
    halves = packed.view(len(packed), -1, 1, BLOCK // 2)
    return torch.cat([halves & 15, halves >> 4], 2).flatten(1)


def _quantize_groups(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers from -8 to 7, (out, groups, group), and scales, (out, groups), of weights (out, groups, group)."""
    highest, lowest = weights.amax(2), weights.amin(2)
    largest = torch.where(-lowest > highest, lowest, highest)  # with its sign
    # relative weights are at most 1, so that their squares do not overflow
    relative = weights / largest.masked_fill(largest == 0, 1.0)[:, :, None]
    best_numbers, best_scale, best_gain = (
        torch.zeros_like(weights),
        torch.zeros_like(largest),
        torch.zeros_like(largest),
    )
    for inverse in INVERSE_SCALES:
        numbers = (relative * inverse).round_().clamp_(LOWEST, HIGHEST)
        dot = (relative * numbers).sum(2)
        norm = (numbers * numbers).sum(2)
        scale = torch.where(norm > 0, dot / norm, 0.0)
        gain = dot * scale  # by how much the squared error is below that of zeros
        better = gain > best_gain
        torch.where(better, gain, best_gain, out=best_gain)
        torch.where(better, scale, best_scale, out=best_scale)
        torch.where(better[:, :, None], numbers, best_numbers, out=best_numbers)
    return best_numbers, best_scale.mul_(largest)
