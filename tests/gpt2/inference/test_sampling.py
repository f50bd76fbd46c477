import math

import pytest
import torch

from gpt2.inference.request import Sampling
from gpt2.inference.sampling import apply_repetition_penalty, candidate_tokens, sample_token


def logits(*values):
    return torch.tensor(values).log()


def distribution(of, sampling):
    """The probabilities of all ids."""
    probs, ids = candidate_tokens(of, sampling)
    full = torch.zeros(of.numel())
    full[torch.arange(of.numel())[: probs.numel()] if ids is None else ids] = probs
    return full


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


def test_the_repetition_penalty_divides_a_small_positive_logit():
    assert apply_repetition_penalty(torch.tensor([0.5, -0.5]), [0, 1], 2.0).tolist() == [0.25, -1.0]


def test_the_repetition_penalty_ignores_ids_beyond_the_vocabulary():
    assert apply_repetition_penalty(torch.ones(4), [3, 4], 2.0).tolist() == [1.0, 1.0, 1.0, 0.5]


def test_top_p_after_top_k_keeps_the_ids_of_the_vocabulary():
    probs = distribution(logits(0.1, 0.4, 0.2, 0.3), Sampling(top_k=3, top_p=0.6))
    assert torch.allclose(probs, torch.tensor([0, 4 / 7, 0, 3 / 7]))


def test_top_p_keeps_all_tokens_if_it_needs_the_last_one():
    probs = distribution(logits(0.1, 0.4, 0.2, 0.3), Sampling(top_p=0.95))
    assert torch.allclose(probs, torch.tensor([0.1, 0.4, 0.2, 0.3]))


def test_top_p_keeps_no_more_tokens_than_reach_it():
    assert (distribution(torch.zeros(4), Sampling(top_p=0.5)) > 0).sum() == 2


def test_a_top_p_of_1_keeps_the_least_likely_token():
    # the first probability rounds to 1 in fp32, and would leave nothing for the second
    assert (distribution(torch.tensor([0.0, -40.0]), Sampling(top_p=1.0)) > 0).all()


def test_tensors_are_made_on_the_device_of_the_logits():
    of = torch.ones(4)
    with torch.device("meta"):  # another default device
        probs, _ = candidate_tokens(of, Sampling(temperature=0))
        assert probs.is_cpu
        assert apply_repetition_penalty(of, [1], 2.0).tolist() == [1.0, 0.5, 1.0, 1.0]


def test_two_candidates_are_drawn_as_often_as_the_model_says():
    of, random = logits(0.25, 0.75), torch.Generator().manual_seed(1)
    draws = [sample_token(of, Sampling(), random) for _ in range(1000)]
    assert sum(draws) / 1000 == pytest.approx(0.75, abs=0.05)


def test_draws_depend_on_the_generator_alone():
    def draws():
        generator = torch.Generator().manual_seed(1)
        return [sample_token(torch.zeros(100), Sampling(), generator) for _ in range(5)]

    assert draws() == draws()
