import json

import pytest
import torch

from gpt2 import tokenizer
from gpt2.errors import FileError
from gpt2.hub.export import save_pretrained, save_space_model, verify_logits
from gpt2.model.hugging_face import from_pretrained
from tests.conftest import TINY


@pytest.fixture
def hugging_face(tiny_model, tmp_path):
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    save_pretrained(tiny_model, tmp_path)
    return tmp_path


def test_transformers_computes_our_logits(tiny_model, hugging_face):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(str(hugging_face))
    idx = torch.randint(50257, (2, TINY.block_size))
    difference = (tiny_model(idx)[0] - theirs(idx).logits).abs().max().item()
    assert difference <= 1e-4
    assert tiny_model(idx)[0].abs().max() > 0.1


def test_transformers_tokenizes_like_us(hugging_face, text):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(hugging_face))
    for sample in (text[:500], "naïve 漢字 👩‍👩‍👧 \n\n\t x  ", "don't we'll 123abc"):
        assert theirs(sample)["input_ids"] == tokenizer.encode(sample)
        assert theirs.decode(tokenizer.encode(sample)) == sample
    assert theirs.eos_token_id == tokenizer.END_OF_TEXT
    assert theirs.model_max_length == TINY.block_size


def test_from_pretrained_loads_our_export(tiny_model, hugging_face):
    idx = torch.arange(20)[None]
    assert torch.equal(from_pretrained(str(hugging_face)).eval()(idx)[0], tiny_model(idx)[0])


def test_the_config_has_the_keys_that_converters_need(hugging_face):
    config = json.loads((hugging_face / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == TINY.block_size


def test_the_space_files_are_plain_dicts(tiny_model, tmp_path):
    save_space_model(tiny_model, tmp_path)
    config = torch.load(tmp_path / "gpt_config.pt", weights_only=True)
    weights = torch.load(tmp_path / "gpt_model.pt", weights_only=True)
    assert type(config) is dict
    assert config == TINY.to_dict()
    assert type(weights) is dict
    assert set(weights) == set(tiny_model.state_dict())
    assert weights["transformer.h.0.attn.c_attn.weight"].shape == (48, 16)  # as nn.Linear has it
    assert not [name for name in weights if name.endswith((".attn.bias", "masked_bias"))]
    # the tied matrix is in the file once
    once = sum(w.numel() for name, w in weights.items() if name != "lm_head.weight") * 4
    assert (tmp_path / "gpt_model.pt").stat().st_size < once * 1.1


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_different_logits_are_an_error(tiny_model, wrong):
    def logits(tokens):
        return tiny_model(tokens)[0]

    assert verify_logits(tiny_model, lambda tokens: logits(tokens) + 1e-6, "it") == pytest.approx(1e-6, rel=0.5)
    with pytest.raises(FileError, match="the logits of it differ"):
        verify_logits(tiny_model, lambda tokens: logits(tokens) + wrong, "it")
