"""4-bit weights: their storage format, and the scales that represent a matrix best.

A weight is stored as a number from 0 to 15, which stands for (number - 8) * scale. Each group of consecutive inputs of
an output has its own scale. Scales may be negative: the weight of largest magnitude then becomes -8, which uses all
sixteen numbers, as in llama.cpp's q4_0 (https://github.com/ggml-org/ggml, quantize_row_q4_0_ref).

Numbers lie in blocks (`gpt2.kernels.blocks`), of which two successive words of a channel share a word: the first is in
its low four bits of each byte, the second in its high four bits. Scales lie as (blocks, groups, 16).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.kernels import feedback
from gpt2.kernels.blocks import CHANNELS, from_blocks, to_blocks
from gpt2.kernels.feedback import HIGHEST, LOWEST, FeedbackRounding

GROUPS = (32, 64, 128)
ZERO = 8
INVERSE_SCALES = (-8.0, -8.3, -7.7, -7.4, -7.0)
"""What the weight of largest magnitude of a group is multiplied to, before rounding. Beyond -8 it is clipped. Trying up
to -9.5 has a lower squared error, but a larger Kullback-Leibler divergence of the head with groups of 64 and 128."""
CHUNK_WEIGHTS = 1 << 18  # 1 MB in fp32; the temporaries take about ten times that


@torch.no_grad()
def quantize_int4(weight: Tensor, group: int, inputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The packed numbers, (blocks, in / 8, 16, 4) uint8, and scales, (blocks, in / group, 16), of a weight (out, in).

    inputs: example inputs of the layer, (N, in), finite. With them, the error of a weight makes up for those of others
    (`gpt2.kernels.feedback`). Without them, each group takes the one of several scales that has the least squared
    error. Each is the least-squares fit of the weights w to the numbers n that it is tried with, sum(w n) / sum(n n),
    as in llama.cpp's make_qx_quants.
    Finite weights give finite scales (up to 1e38). Channels are padded to a multiple of 16. Raises ValueError for other
    shapes.
    """
    if group not in GROUPS:
        raise ValueError(f"a group has {', '.join(map(str, GROUPS))} inputs, not {group}")
    if weight.dim() != 2 or weight.size(1) % group:
        raise ValueError(f"a weight has the shape (out, in), with in a multiple of {group}; not {tuple(weight.shape)}")
    in_features = weight.size(1)
    rounding = None if inputs is None else FeedbackRounding(inputs, group)
    at_once = CHUNK_WEIGHTS if rounding is None else feedback.CHUNK_WEIGHTS
    rows = max(CHANNELS, at_once // in_features // CHANNELS * CHANNELS)
    packed, scales = [], []
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows].float().reshape(-1, in_features // group, group)
        numbers, scale = rounding(part) if rounding else _quantize_groups(part)
        packed.append(pack((numbers.flatten(1) + ZERO).to(torch.uint8)))
        padded = F.pad(scale, (0, 0, 0, -len(part) % CHANNELS))
        scales.append(padded.view(-1, CHANNELS, scale.size(1)).transpose(1, 2))
    return torch.cat(packed), torch.cat(scales).contiguous()


def dequantize_int4(packed: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights, (out, in) with out padded to a multiple of 16, of packed numbers and scales."""
    by_row = scales.transpose(1, 2).flatten(0, 1)  # (out, groups)
    numbers = unpack(packed).float().sub_(ZERO).view(*by_row.shape, -1)
    return numbers.mul_(by_row[:, :, None]).flatten(1).to(dtype)


def pack(numbers: Tensor) -> Tensor:
    """Numbers from 0 to 15, (out, in) uint8, as (blocks, in / 8, 16, 4) bytes."""
    words = to_blocks(numbers)
    return words[:, ::2] | words[:, 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """The numbers from 0 to 15, (out, in) uint8 with out a multiple of 16, in (blocks, in / 8, 16, 4) bytes."""
    return from_blocks(torch.stack([packed & 15, packed >> 4], 2).flatten(1, 2))


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
