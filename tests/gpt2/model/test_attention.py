import pytest
import torch
import torch.nn.functional as F

from gpt2.config import END_OF_TEXT, GPTConfig
from gpt2.model import attention
from gpt2.model.attention import causal_attention, tiled_attention, within_documents
from gpt2.model.transformer import GPT
from gpt2.training.mixed_precision import MixedPrecisionModel
from tests.conftest import needs_compiler


def inputs(length, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return [torch.randn(2, 3, length, 16).to(dtype).requires_grad_() for _ in range(3)]


def documents(length):
    tokens = torch.zeros(2, length, dtype=torch.long)
    tokens[0, ::37] = END_OF_TEXT
    return within_documents(tokens)


def check(y, q, k, v, visible, tolerances):
    """Compares attention and its gradients with PyTorch's in fp64."""
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril() if visible is None else visible
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    assert (y - exact).abs().max() < tolerances[0]
    weights = torch.randn(y.shape)
    ours = torch.autograd.grad((y * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((exact * weights).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        assert ((a.double() - b).norm() / b.double().norm()) < tolerances[1]


@pytest.mark.parametrize(("dtype", "tolerances"), [(torch.float32, (1e-6, 1e-6)), (torch.bfloat16, (0.03, 0.02))])
def test_attention_of_short_sequences_matches_pytorch(dtype, tolerances):
    q, k, v = inputs(17, dtype)
    check(causal_attention(q, k, v), q, k, v, None, tolerances)


@pytest.fixture(params=[False, True], ids=["without AMX", "with AMX"])
def with_amx(request, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: request.param)


@pytest.mark.usefixtures("with_amx")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [100, 257, 600])
def test_attention_by_tiles_matches_pytorch(length, masked):
    q, k, v = inputs(length)
    visible = documents(length) if masked else None
    check(tiled_attention(q, k, v, visible), q, k, v, visible, (0.03, 0.02))


@pytest.mark.usefixtures("with_amx")
@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_tiles_is_a_proper_operator(masked):
    torch.library.opcheck(tiled_attention, (*inputs(300), documents(300) if masked else None), atol=0.03, rtol=0.03)


@needs_compiler
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_models_use_it_for_long_sequences_in_bf16_compiled_or_not(monkeypatch, gradient_checkpointing):
    config = GPTConfig(block_size=300, vocab_size=500, n_layer=2, n_head=2, n_embd=32)
    tokens, targets = torch.randint(0, 500, (2, 2, 300), generator=torch.Generator().manual_seed(1))
    calls = []
    tiles = attention._tiles
    monkeypatch.setattr(attention, "_tiles", lambda *arguments: calls.append(1) or tiles(*arguments))

    def gradients(*, compiled):
        torch.manual_seed(3)
        model = MixedPrecisionModel(GPT(config), torch.bfloat16, gradient_checkpointing=gradient_checkpointing)
        if compiled:
            model.compile(2, 300)
        calls.clear()
        loss = model.loss(tokens, targets)
        loss.backward()
        assert len(calls) >= 4  # 2 layers, 2 sequences
        return loss.item(), torch.cat([p.grad.flatten() for p in model.master.parameters()])

    loss, expected = gradients(compiled=False)
    first, second = gradients(compiled=True), gradients(compiled=True)
    assert first[0] == pytest.approx(loss, rel=1e-3)
    assert ((first[1] - expected).norm() / expected.norm()) < 0.03
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
