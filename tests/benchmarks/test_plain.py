import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain import PlainGPT, products_alone
from gpt2.model.transformer import GPT, GPTConfig

CONFIG = GPTConfig(block_size=16, vocab_size=96, n_layer=2, n_head=2, n_embd=32)


def test_the_peer_is_the_same_model():
    torch.manual_seed(0)
    ours, peer = GPT(CONFIG), PlainGPT(CONFIG)
    names = {
        "tokens": "wte",
        "positions": "wpe",
        "blocks": "h",
        "norm": "ln_f",
        "norm_1": "ln_1",
        "norm_2": "ln_2",
        "qkv": "attn.c_attn",
        "out": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    }
    theirs = ours.state_dict()
    state = {
        name: theirs["transformer." + ".".join(names.get(part, part) for part in name.split("."))]
        for name in peer.state_dict()
        if name != "head.weight"
    }
    peer.load_state_dict({**state, "head.weight": theirs["lm_head.weight"]})
    assert sum(p.numel() for p in peer.parameters()) == CONFIG.num_parameters()
    idx, targets = torch.randint(0, 96, (2, 3, 16))
    assert torch.allclose(peer(idx, targets), ours(idx, targets)[1], atol=1e-6)


def test_products_alone_match_the_products_of_a_step():
    with FlopCounterMode(display=False) as alone:
        for product in products_alone(CONFIG, 3, 16, torch.float32, torch.device("cpu")):
            product()
    expected = CONFIG.flops_per_token(16) * 3 * 16
    # the formula counts biases and LayerNorm as weights of products
    assert alone.get_total_flops() == pytest.approx(expected, rel=0.03)
