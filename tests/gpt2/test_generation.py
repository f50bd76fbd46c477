import math

import pytest
import torch

from gpt2.config import GPTConfig
from gpt2.errors import UserError
from gpt2.generation import Sampling, context_start, generate, probabilities, prompts_from
from gpt2.model import GPT
from gpt2.tokenizer import END_OF_TEXT


@pytest.fixture
def lively_model() -> GPT:
    """A random model whose choices depend on what it has seen."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=24, vocab_size=50257, n_layer=2, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(), Sampling(temperature=0.7, top_k=40, top_p=0.9)]
)
@pytest.mark.parametrize("context", [None, 10])
def test_the_cache_changes_no_token(lively_model, sampling, context):
    # 60 tokens go far past the context of 24
    def run(use_cache):
        return list(
            generate(
                lively_model,
                [1, 2, 3],
                max_new_tokens=60,
                sampling=sampling,
                seed=4,
                context=context,
                use_cache=use_cache,
            )
        )

    with_cache = run(True)
    assert with_cache == run(False)
    assert len(with_cache) == 60
    assert len(set(with_cache)) > 3


def test_the_seed_decides_the_text(lively_model):
    def run(seed):
        return list(generate(lively_model, [1], max_new_tokens=12, sampling=Sampling(), seed=seed))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_greedy_takes_the_likeliest(lively_model):
    (token,) = generate(lively_model, [5, 6], max_new_tokens=1, sampling=Sampling(temperature=0), seed=0)
    assert token == int(lively_model(torch.tensor([[5, 6]]))[0][0, -1].argmax())


def test_a_prompt_longer_than_the_context_is_looked_at_from_its_end(lively_model):
    prompt = list(range(100))
    tokens = list(generate(lively_model, prompt, max_new_tokens=5, sampling=Sampling(temperature=0), seed=0))
    start = context_start(100, 24)
    assert tokens[0] == int(lively_model(torch.tensor([prompt[start:]]))[0][0, -1].argmax())


def test_prompts_are_beginnings_of_lines_from_all_over_a_text():
    text = "".join(f"Line {i} has  five words\n\nshort line\n" for i in range(60))
    assert prompts_from(text) == ["Line 10 has", "Line 30 has", "Line 50 has"]
    assert prompts_from("one two three four") == ["one two three"]
    assert prompts_from("word") == ["word"]
    assert prompts_from(" ") == [""]


@pytest.mark.parametrize("context", [1, 2, 7, 24])
def test_the_view_never_exceeds_the_context_and_moves_rarely(context):
    starts = [context_start(length, context) for length in range(1, 200)]
    seen = [length - start for length, start in zip(range(1, 200), starts, strict=True)]
    assert all(1 <= s <= context for s in seen)
    assert starts == sorted(starts)
    assert len(set(starts)) <= 1 + math.ceil(200 / max(1, context // 2))


def test_generation_ends_at_the_end_of_text(tiny_model):
    with torch.no_grad():  # whatever it sees, the end is the likeliest
        tiny_model.transformer["ln_f"].weight.zero_()
        tiny_model.transformer["ln_f"].bias.copy_(100 * tiny_model.lm_head.weight[END_OF_TEXT])
    tokens = generate(tiny_model, [1], max_new_tokens=9, sampling=Sampling(temperature=0), seed=0)
    assert list(tokens) == []


@pytest.mark.parametrize("prompt", [[], [-1], [50257]])
def test_a_prompt_outside_the_vocabulary_is_refused(tiny_model, prompt):
    with pytest.raises(UserError, match="prompt"):
        list(generate(tiny_model, prompt, max_new_tokens=1, sampling=Sampling(), seed=0))


def logits(*values):
    return torch.tensor(values).log()


def test_top_k_keeps_the_k_likeliest():
    probs = probabilities(logits(0.1, 0.4, 0.2, 0.3), Sampling(top_k=2))
    assert torch.allclose(probs, torch.tensor([0, 4 / 7, 0, 3 / 7]))


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, [1]), (0.4, [1]), (0.45, [1, 3]), (0.71, [1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_that_have_it_together(top_p, kept):
    probs = probabilities(logits(0.1, 0.4, 0.2, 0.3), Sampling(top_p=top_p))
    assert probs.nonzero().flatten().tolist() == kept
    assert probs.sum().item() == pytest.approx(1)


def test_temperature_sharpens():
    probs = probabilities(logits(0.2, 0.8), Sampling(temperature=0.5))
    assert torch.allclose(probs, torch.tensor([0.04, 0.64]) / 0.68)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0), Sampling(top_k=50300), Sampling(top_p=0.99)])
def test_ids_of_a_padded_vocabulary_have_no_probability(sampling):
    padded = torch.zeros(50304)
    padded[50257:] = 100.0
    assert probabilities(padded, sampling)[50257:].sum() == 0


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is"):
        Sampling(**wrong)
