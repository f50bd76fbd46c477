from gpt2.evaluation.samples import generate_samples, prompts_from
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


def test_prompts_are_first_words_of_evenly_spaced_lines():
    text = "".join(f"Line {i} has  five words\n\nshort line\n" for i in range(60))
    assert prompts_from(text) == ["Line 10 has", "Line 30 has", "Line 50 has"]
    assert prompts_from("one two three four") == ["one two three"]
    assert prompts_from("word") == ["word"]
    assert prompts_from(" ") == [""]
