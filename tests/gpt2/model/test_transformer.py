import itertools
import math
import sys

import pytest
import torch

from gpt2.config import END_OF_TEXT, GPTConfig
from gpt2.errors import UserError
from gpt2.model.hugging_face import from_pretrained, swap_conv1d_layout
from gpt2.model.transformer import GPT
from tests.conftest import TINY


def test_num_parameters_matches_the_formula():
    for config in (TINY, GPTConfig(block_size=10, vocab_size=51, n_layer=3, n_head=3, n_embd=12)):
        assert sum(p.numel() for p in GPT(config).parameters()) == config.num_parameters()


def test_initialisation_has_the_standard_deviations_of_the_table():
    config = GPTConfig(block_size=256, vocab_size=4000, n_layer=6, n_head=4, n_embd=128)
    torch.manual_seed(1)
    model = GPT(config)
    residual_std = 0.02 * (2 * 6) ** -0.5
    groups: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        groups.setdefault(kind, []).append(parameter.detach().flatten())
    assert len(groups) == 16  # every kind of parameter is met
    for kind, parameters in groups.items():
        values = torch.cat(parameters)
        if kind.endswith("bias"):
            assert values.eq(0).all(), kind
        elif ".ln_" in kind:
            assert values.eq(1).all(), kind
        else:
            expected = residual_std if kind.endswith("c_proj.weight") else 0.02
            assert values.std().item() == pytest.approx(expected, rel=0.03), kind
            assert values.mean().abs().item() < expected / 10, kind


def test_the_initial_loss_is_that_of_a_uniform_distribution():
    torch.manual_seed(0)
    idx = torch.randint(50257, (4, 32))
    _, loss = GPT(TINY)(idx, torch.randint(50257, (4, 32)))
    assert loss.item() == pytest.approx(math.log(50257), abs=0.05)


def test_embedding_and_head_are_tied(tiny_model):
    assert tiny_model.lm_head.weight is tiny_model.transformer["wte"].weight


def test_weights_have_openais_names(tiny_model):
    names = set(tiny_model.state_dict())
    assert {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight", "transformer.ln_f.bias"} <= names
    block = {n.removeprefix("transformer.h.1.") for n in names if n.startswith("transformer.h.1.")}
    layers = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    assert block == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_attention_is_causal(tiny_model):
    idx = torch.randint(50257, (1, 20))
    changed = idx.clone()
    changed[0, 12:] = 0
    before, after = tiny_model(idx)[0], tiny_model(changed)[0]
    assert torch.allclose(before[:, :12], after[:, :12], atol=1e-6)
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-3)


def test_masked_documents_are_computed_as_if_each_were_alone(tiny_model):
    idx = torch.randint(1000, (2, 20))
    idx[0, 7] = idx[1, 0] = idx[1, 18] = END_OF_TEXT  # it begins a document
    unmasked = tiny_model(idx)[0]
    tiny_model.mask_documents = True
    masked = tiny_model(idx)[0]
    for row, documents in enumerate([[0, 7, 20], [0, 18, 20]]):
        for begin, end in itertools.pairwise(documents):
            positions = torch.arange(begin, end)[None]  # those of the window
            alone = tiny_model.lm_head(tiny_model.blocks(tiny_model.embed(idx[row : row + 1, begin:end], positions)))
            assert torch.allclose(masked[row, begin:end], alone[0], atol=1e-5)
    assert torch.allclose(masked[1, :18], unmasked[1, :18], atol=1e-5)
    assert not torch.allclose(masked[0, 7:], unmasked[0, 7:], atol=1e-3)


def test_the_original_projects_code_loads_our_weights(tiny_model, tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"config": TINY.to_dict(), "model_state_dict": tiny_model.state_dict()}, path)
    checkpoint = torch.load(path, weights_only=True)
    model = GPT(checkpoint["config"])
    model.load_state_dict(checkpoint["model_state_dict"])
    idx = torch.arange(10)[None]
    assert torch.equal(model.eval()(idx)[0], tiny_model(idx)[0])


def test_more_tokens_than_the_context_are_refused(tiny_model):
    with pytest.raises(ValueError, match="33 tokens do not fit the context of 32"):
        tiny_model(torch.zeros(1, 33, dtype=torch.long))


def test_gelu_is_the_tanh_approximation(tiny_model):
    mlp = tiny_model.transformer["h"][0].mlp
    x = torch.linspace(-3, 3, 16).repeat(1, 1, 1)
    h = mlp.c_fc(x)
    gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    assert torch.allclose(mlp(x), mlp.c_proj(gelu), atol=1e-6)


def their_model(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(vocab_size=503, n_positions=48, n_embd=36, n_layer=3, n_head=3, **changes)
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():  # also what starts as 0 or 1
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def test_imported_hugging_face_weights_have_the_same_logits(tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(str(tmp_path)).eval()
    idx = torch.randint(503, (2, 48))
    difference = (ours(idx)[0] - theirs(idx).logits).abs().max().item()
    assert difference <= 1e-4
    assert theirs(idx).logits.abs().max() > 0.1  # they are not just all near 0


def test_a_model_with_another_activation_is_refused(tmp_path):
    their_model(activation_function="relu").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="activation"):
        from_pretrained(str(tmp_path))


def test_a_folder_without_weights_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot load GPT-2 from") as raised:
        from_pretrained(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_without_transformers_the_error_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install"):
        from_pretrained("gpt2")


def test_openais_names_are_never_local_folders(monkeypatch):
    import transformers

    asked = []

    def refuse(location, **_):
        asked.append(location)
        raise OSError("no network")

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", refuse)
    with pytest.raises(UserError, match="no network"):
        from_pretrained("gpt2")  # in this repository there is a folder of that name
    assert asked == ["openai-community/gpt2"]


def test_swap_conv1d_layout_is_its_own_inverse(tiny_model):
    state = tiny_model.state_dict()
    swapped = swap_conv1d_layout(state)
    assert swapped["transformer.h.0.mlp.c_fc.weight"].shape == (16, 64)
    assert all(torch.equal(w, state[name]) for name, w in swap_conv1d_layout(swapped).items())
