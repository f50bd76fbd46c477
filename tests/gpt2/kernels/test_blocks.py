import pytest
import torch

from gpt2.kernels.blocks import from_blocks, to_blocks


def test_a_word_has_four_inputs_of_a_channel_and_a_block_sixteen_channels():
    rows = torch.arange(32 * 8).view(32, 8)
    blocks = to_blocks(rows)
    assert blocks.shape == (2, 2, 16, 4)
    assert blocks.is_contiguous()
    assert torch.equal(blocks[1, 0, 3], rows[19, :4])
    assert torch.equal(blocks[0, 1, 15], rows[15, 4:])


@pytest.mark.parametrize(("out", "width"), [(32, 8), (1, 4), (17, 64), (5, 6)])
def test_blocks_hold_all_rows_and_zeros_around_them(out, width):
    rows = torch.randint(-128, 128, (out, width), dtype=torch.int8)
    back = from_blocks(to_blocks(rows))
    assert back.dtype == torch.int8
    assert back.shape == (-(-out // 16) * 16, -(-width // 4) * 4)
    assert torch.equal(back[:out, :width], rows)
    assert not back[out:].any()
    assert not back[:, width:].any()
