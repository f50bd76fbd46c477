import math

import pytest
import torch

from gpt2 import tokenizer
from gpt2.errors import UserError
from gpt2.evaluation.samples import prompts_from
from gpt2.inference.detokenizer import Detokenizer
from gpt2.inference.kv_cache import window_start
from gpt2.inference.request import Request, Sampling
from gpt2.inference.sampling import apply_repetition_penalty, candidate_tokens, sample_token
from gpt2.tokenizer import END_OF_TEXT


def logits(*values):
    return torch.tensor(values).log()


def distribution(of, sampling):
    """The probabilities of all ids."""
    probs, ids = candidate_tokens(of, sampling)
    full = torch.zeros(of.numel())
    full[torch.arange(of.numel())[: probs.numel()] if ids is None else ids] = probs
    return full


def test_prompts_are_first_words_of_evenly_spaced_lines():
    text = "".join(f"Line {i} has  five words\n\nshort line\n" for i in range(60))
    assert prompts_from(text) == ["Line 10 has", "Line 30 has", "Line 50 has"]
    assert prompts_from("one two three four") == ["one two three"]
    assert prompts_from("word") == ["word"]
    assert prompts_from(" ") == [""]


@pytest.mark.parametrize("context", [1, 2, 7, 24])
def test_the_window_never_exceeds_the_context_and_moves_rarely(context):
    starts = [window_start(length, context) for length in range(1, 200)]
    seen = [length - start for length, start in zip(range(1, 200), starts, strict=True)]
    assert all(1 <= s <= context for s in seen)
    assert starts == sorted(starts)
    assert len(set(starts)) <= 1 + math.ceil(200 / max(1, context // 2))


def test_greedy_has_one_candidate():
    assert torch.equal(distribution(logits(0.1, 0.6, 0.3), Sampling(temperature=0)), torch.tensor([0.0, 1, 0]))


def test_top_k_keeps_the_k_likeliest():
    probs = distribution(logits(0.1, 0.4, 0.2, 0.3), Sampling(top_k=2))
    assert torch.allclose(probs, torch.tensor([0, 4 / 7, 0, 3 / 7]))


@pytest.mark.parametrize("top_k", [None, 4, 9])
@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, [1]), (0.4, [1]), (0.45, [1, 3]), (0.71, [1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_smallest_set(top_p, kept, top_k):
    probs = distribution(logits(0.1, 0.4, 0.2, 0.3), Sampling(top_p=top_p, top_k=top_k))
    assert probs.nonzero().flatten().tolist() == kept
    assert probs.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.999])
def test_top_p_sorts_as_many_candidates_as_needed(spread, top_p):
    many = spread * torch.randn(50257, generator=torch.Generator().manual_seed(3))
    probs = many.softmax(0)
    ordered, order = probs.sort(descending=True)
    kept = order[: int((ordered.double().cumsum(0) - ordered < top_p).sum())]
    found = distribution(many, Sampling(top_p=top_p))
    # numbers that are equal may stand in another order
    assert abs(int((found > 0).sum()) - len(kept)) <= 1 + len(kept) // 1000
    assert (found[kept[: max(1, len(kept) * 9 // 10)]] > 0).all()
    assert found.sum().item() == pytest.approx(1, abs=1e-4)


def test_temperature_sharpens():
    probs = distribution(logits(0.2, 0.8), Sampling(temperature=0.5))
    assert torch.allclose(probs, torch.tensor([0.04, 0.64]) / 0.68)


def test_the_repetition_penalty_makes_earlier_tokens_less_likely():
    raw = torch.tensor([2.0, -2.0, 1.0, 0.5])
    assert apply_repetition_penalty(raw, [0, 1, 1, 99], 2.0).tolist() == [1.0, -4.0, 1.0, 0.5]
    assert raw.tolist() == [2.0, -2.0, 1.0, 0.5]
    assert apply_repetition_penalty(raw, [0], 1.0) is raw


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0), Sampling(top_k=50300), Sampling(top_p=0.99), Sampling(top_k=9, top_p=0.5)],
)
def test_padded_ids_are_never_sampled(sampling):
    padded = torch.zeros(50304)
    padded[50257:] = 100.0
    probs, ids = candidate_tokens(padded, sampling)
    assert probs.numel() <= 50257
    assert ids is None or int(ids.max()) < 50257
    random = torch.Generator().manual_seed(1)
    for _ in range(20):
        assert sample_token(padded, sampling, random) < 50257


def test_samples_follow_the_distribution_of_the_model():
    of, random = logits(0.1, 0.4, 0.2, 0.3), torch.Generator().manual_seed(1)
    for sampling in (Sampling(), Sampling(top_k=3), Sampling(top_p=0.8)):
        counts = torch.zeros(4)
        for _ in range(5000):
            counts[sample_token(of, sampling, random)] += 1
        assert torch.allclose(counts / 5000, distribution(of, sampling), atol=0.02)


def test_tokens_without_probability_are_never_sampled():
    of, random = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]), torch.Generator().manual_seed(1)
    assert {sample_token(of, Sampling(), random) for _ in range(100)} == {1, 3}


def pieces(text, stop=()):
    stream = Detokenizer(stop)
    found = []
    for token in tokenizer.encode(text):
        found.append(stream.push(token))
        if stream.stopped:
            return found
    return [*found, stream.flush()]


def test_characters_of_several_tokens_are_complete():
    found = pieces("naïve 漢字 🙂!")
    assert "".join(found) == "naïve 漢字 🙂!"
    assert not any("\ufffd" in piece for piece in found)
    half = Detokenizer()
    assert half.push(tokenizer.encode("🙂")[0]) == ""
    assert half.flush() == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("wo th",), "one t"),
        ("one two three", ("three!", "w t"), "one two three"),
        ("one two three", ("three", "two"), "one "),
        ("aaab", ("aab",), "a"),
        ("the end\n\nand more", ("\n\n",), "the end"),
        ("🙂🙃", ("🙃",), "🙂"),
    ],
)
def test_a_stop_string_ends_the_text_and_is_never_shown(text, stop, expected):
    found = pieces(text, stop)
    assert "".join(found) == expected
    for end in range(len(found)):
        assert expected.startswith("".join(found[:end]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.inf},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is"):
        Sampling(**wrong)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"prompt": []}, "a prompt needs"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": -1}, "the seed is -1"),
        ({"stop": ("a", "")}, "a stop string is empty"),
    ],
)
def test_invalid_requests_are_refused(wrong, expected):
    with pytest.raises(UserError, match=expected):
        Request(**{"prompt": [1], "max_new_tokens": 5, **wrong})


def test_the_end_of_the_text_is_a_stop_token():
    assert END_OF_TEXT in Request([1], 1).stop_token_ids
