import pytest

from gpt2.config import PRESETS, GPTConfig
from gpt2.errors import UserError

SIZES = {"block_size": 8, "vocab_size": 100, "n_layer": 2, "n_head": 2, "n_embd": 16}


def test_from_dict_accepts_the_five_keys():
    assert GPTConfig.from_dict(SIZES).to_dict() == SIZES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 2}, "n_layers"),
        ({"n_head": 3}, "not a multiple"),
        ({"n_head": 0}, "n_head is 0"),
        ({"n_embd": "16"}, "n_embd is '16'"),
        ({"n_layer": True}, "n_layer is True"),
        ({"vocab_size": 2.0}, "vocab_size is 2.0"),
    ],
)
def test_from_dict_names_the_invalid_value(changes, message):
    with pytest.raises(UserError, match=message):
        GPTConfig.from_dict({**SIZES, **changes})


def test_from_dict_refuses_other_types():
    with pytest.raises(UserError, match="list"):
        GPTConfig.from_dict([1, 2])
    with pytest.raises(UserError, match="keys"):
        GPTConfig.from_dict({k: v for k, v in SIZES.items() if k != "n_head"})


def test_presets_have_the_published_sizes():
    # Radford et al. (2019) count 117M, 345M, 762M and 1542M; these are the sizes of the published weights
    counts = {name: round(config.num_parameters() / 1e6) for name, config in PRESETS.items()}
    assert counts == {"gpt2": 124, "gpt2-medium": 355, "gpt2-large": 774, "gpt2-xl": 1558}


def test_unknown_preset_lists_the_known():
    with pytest.raises(UserError, match="gpt2-medium"):
        GPTConfig.preset("gpt2-huge")


def test_warm_up_and_learning_rates_must_fit(train_config):
    with pytest.raises(ValueError, match="warmup_steps 6 is longer than the run"):
        train_config(warmup_steps=6)
    with pytest.raises(ValueError, match="min_learning_rate"):
        train_config(min_learning_rate=1.0)


def test_frozen_blocks_take_a_third_of_the_flops():
    sizes = GPTConfig(block_size=32, vocab_size=50257, n_layer=4, n_head=2, n_embd=16)
    all_of_it, *frozen = (sizes.flops_per_token(32, n) for n in range(4))
    assert all_of_it == sizes.flops_per_token(32)
    differences = [frozen[0] - frozen[1], frozen[1] - frozen[2]]
    block = GPTConfig(32, 50257, 5, 2, 16).flops_per_token(32) - all_of_it
    assert differences == [2 * block // 3] * 2
    assert all_of_it - frozen[0] == 2 * block // 3 + 2 * 50257 * 16


def test_frozen_blocks_need_trained_weights(train_config):
    with pytest.raises(ValueError, match="freeze_layers 1 keeps random weights as they are; name a model in init_from"):
        train_config(freeze_layers=1)
    assert train_config(freeze_layers=1, init_from="gpt2").freeze_layers == 1


def test_step_tokens_counts_all_micro_batches(train_config):
    assert train_config().tokens_per_step == 4 * 2 * 16
