from gpt2.evaluation.samples import generate_samples
from gpt2.inference.request import Sampling


def test_each_prompt_has_its_own_sample(tiny_model):
    counts = []

    def samples():
        options = {"max_new_tokens": 10, "seed": 1, "context_length": 16, "progress": counts.append}
        return generate_samples(tiny_model, ["a", "a", ""], Sampling(top_k=50), **options)

    first = samples()
    assert len(first) == len(set(first)) == 3
    assert sum(counts) == 30
    assert samples() == first
