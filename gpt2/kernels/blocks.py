"""The layout of 8-bit and 4-bit weights: blocks of 16 output channels.

The instructions for 8-bit products sum four neighbouring products into each 32-bit lane of a vector. So a word holds
four inputs of one channel, and 16 words with the same inputs, one for each channel of a block, lie side by side: each
lane is then a channel, and nothing is left to be summed across lanes.

A block is followed by the next one. Channels are padded to a multiple of 16, and inputs to a multiple of 4, by zeros.
"""

import torch.nn.functional as F
from torch import Tensor

CHANNELS = 16
INPUTS = 4


def to_blocks(rows: Tensor) -> Tensor:
    """(out, in) to (blocks, words, 16, 4), contiguous."""
    out, width = rows.shape
    padded = F.pad(rows, (0, -width % INPUTS, 0, -out % CHANNELS))
    return padded.view(padded.size(0) // CHANNELS, CHANNELS, -1, INPUTS).transpose(1, 2).contiguous()


def from_blocks(blocks: Tensor) -> Tensor:
    """(blocks, words, 16, 4) to (out, in), padded as they are, contiguous."""
    return blocks.transpose(1, 2).reshape(blocks.size(0) * CHANNELS, -1)
