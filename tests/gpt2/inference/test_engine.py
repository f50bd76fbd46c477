import threading
import time
from dataclasses import replace

import pytest
import torch

from gpt2 import tokenizer
from gpt2.config import GPTConfig
from gpt2.errors import BusyError, GPT2Error, UserError
from gpt2.inference import quantization
from gpt2.inference.engine import Engine, generate
from gpt2.inference.kv_cache import window_start
from gpt2.inference.quantization import quantize
from gpt2.inference.request import Request, Sampling
from gpt2.inference.sampling import apply_repetition_penalty, sample_token
from gpt2.model.transformer import GPT
from gpt2.tokenizer import END_OF_TEXT

SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(),
    Sampling(temperature=0.7, top_k=40, top_p=0.9),
    Sampling(repetition_penalty=1.5),
]


@pytest.fixture
def random_model() -> GPT:
    """A random model whose predictions depend on the context."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=24, vocab_size=50257, n_layer=2, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def recomputed(model, request, context):
    """The expected tokens and log probabilities, computed without a KV cache."""
    random, ids, generated = torch.Generator().manual_seed(request.seed), list(request.prompt), []
    for _ in range(request.max_new_tokens):
        view = ids[window_start(len(ids), context) :]
        with torch.inference_mode():
            logits = model(torch.tensor([view]))[0][0, -1]
        ids.append(
            sample_token(
                apply_repetition_penalty(logits, view, request.sampling.repetition_penalty), request.sampling, random
            )
        )
        generated.append((ids[-1], float(logits.log_softmax(0)[ids[-1]])))
        if ids[-1] in request.stop_token_ids:
            break
    return generated


def ids_of(tokens):
    return [token.id for token in tokens]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("context", [24, 10])
def test_the_kv_cache_changes_no_token_and_no_probability(random_model, sampling, context):
    request = Request([1, 2, 3], 60, sampling, seed=4)  # far past the context
    (found,) = generate(Engine(random_model, context_length=context), [request])
    expected = recomputed(random_model, request, context)
    assert ids_of(found) == [token for token, _ in expected]
    assert [token.logprob for token in found] == pytest.approx([logprob for _, logprob in expected], abs=1e-4)
    assert len(set(ids_of(found))) > 3


def test_batched_requests_match_single_requests(random_model):
    requests = [
        Request(tokenizer.encode(f"number {i} " * i), 10 + 7 * i, SAMPLINGS[i % 4], seed=i, top_logprobs=i)
        for i in range(1, 8)
    ]
    together = generate(Engine(random_model, slots=3), requests)
    for request, tokens in zip(requests, together, strict=True):
        (alone,) = generate(Engine(random_model), [request])
        assert ids_of(alone) == ids_of(tokens)
        assert [len(token.top_logprobs) for token in tokens] == [request.top_logprobs] * len(tokens)


@pytest.mark.parametrize("attention", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_embd", [32, 256])
def test_in_int8_the_batch_does_not_change_a_bit(n_embd, attention, monkeypatch):
    monkeypatch.setattr(quantization, "attention_dtype", lambda: attention)
    torch.manual_seed(1)
    model = quantize(GPT(GPTConfig(block_size=24, vocab_size=50257, n_layer=2, n_head=2, n_embd=n_embd)), "int8")
    requests = [Request([i, i + 1], 30, seed=i, top_logprobs=3) for i in range(5)]
    together = generate(Engine(model, slots=5), requests)
    assert together == [generate(Engine(model), [request])[0] for request in requests]


def test_a_new_request_joins_a_running_batch(random_model):
    engine = Engine(random_model, slots=2)
    early = engine.submit(Request([1], 20, seed=1, stop_token_ids=frozenset()))
    for _ in range(5):
        engine.step()
    late = engine.submit(Request([2], 3, seed=2, stop_token_ids=frozenset()))
    for _ in range(3):
        engine.step()
    assert (early.finish_reason, late.finish_reason) == (None, "length")
    assert len(late.new_tokens()) == 3
    assert len(early.new_tokens()) == 8


def test_the_seed_decides_the_text(random_model):
    def run(seed):
        return ids_of(generate(Engine(random_model), [Request([1], 12, seed=seed)])[0])

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_prompt_longer_than_the_context_is_truncated_from_the_left(random_model):
    prompt = list(range(100))
    (tokens,) = generate(Engine(random_model), [Request(prompt, 5, Sampling(temperature=0))])
    view = prompt[window_start(100, 24) :]
    assert tokens[0].id == int(random_model(torch.tensor([view]))[0][0, -1].argmax())


def test_alternatives_are_the_likeliest_with_their_probabilities(random_model):
    (tokens,) = generate(Engine(random_model), [Request([5, 6], 1, Sampling(temperature=0), top_logprobs=4)])
    logprobs = random_model(torch.tensor([[5, 6]]))[0][0, -1].log_softmax(0)
    assert [i for i, _ in tokens[0].top_logprobs] == logprobs.topk(4).indices.tolist()
    assert tokens[0].top_logprobs[0] == (tokens[0].id, tokens[0].logprob)
    assert tokens[0].logprob == pytest.approx(float(logprobs.max()), abs=1e-5)


def always(model, token):
    """Changes the model so that one token is always the likeliest by far."""
    with torch.no_grad():
        model.lm_head.weight[token] *= 3
        model.transformer["ln_f"].weight.zero_()
        model.transformer["ln_f"].bias.copy_(100 * model.lm_head.weight[token])
    return model


def test_generation_ends_at_end_of_text(tiny_model):
    completion = Engine(always(tiny_model, END_OF_TEXT)).submit(Request([1], 9, Sampling(temperature=0)))
    assert [(token.id, token.text) for token in completion] == [(END_OF_TEXT, "")]
    assert completion.finish_reason == "end_of_text"


def test_generation_ends_at_a_stop_string(tiny_model):
    (token,) = tokenizer.encode(" again")
    completion = Engine(always(tiny_model, token)).submit(Request([1], 9, Sampling(temperature=0), stop=("in aga",)))
    assert "".join(token.text for token in completion) == " aga"
    assert completion.finish_reason == "stop"


def test_half_a_character_at_the_end_is_a_replacement_character(tiny_model):
    engine = Engine(always(tiny_model, tokenizer.encode("🙂")[0]))
    assert (
        "".join(token.text for token in generate(engine, [Request([1], 2, Sampling(temperature=0))])[0])
        == "\ufffd\ufffd"
    )


def test_a_cancelled_request_frees_its_slot(random_model):
    engine = Engine(random_model, slots=1)
    first, second = (engine.submit(Request([i], 20, stop_token_ids=frozenset())) for i in (1, 2))
    engine.step()
    assert (first.queue_position, second.queue_position) == (-1, 0)
    first.cancel()
    first.cancel()
    engine.step()
    assert first.finish_reason == "cancelled"
    assert len(list(first)) == 1
    assert second.queue_position == -1
    assert len(list(second)) == 20
    assert engine._running == []


def test_a_cancelled_request_leaves_the_queue(random_model):
    engine = Engine(random_model, slots=1)
    completions = [engine.submit(Request([i], 3, stop_token_ids=frozenset())) for i in (1, 2, 3)]
    engine.step()
    assert [completion.queue_position for completion in completions] == [-1, 0, 1]
    completions[1].cancel()
    assert [completion.queue_position for completion in completions] == [-1, -1, 0]
    assert list(completions[1]) == []
    assert len(list(completions[2])) == 3


def test_a_timeout_includes_the_time_in_the_queue(random_model):
    engine = Engine(random_model, slots=1)
    running = engine.submit(Request([1], 1000, timeout_s=0.2, stop_token_ids=frozenset()))
    waiting = engine.submit(Request([1], 1000, timeout_s=0.1, stop_token_ids=frozenset()))
    assert 0 < len(list(running)) < 1000
    assert (running.finish_reason, waiting.finish_reason) == ("timeout", "timeout")
    assert list(waiting) == []


def test_a_full_queue_refuses_requests(random_model):
    engine = Engine(random_model, slots=2, max_queue_size=1)
    completions = [engine.submit(Request([1], 2)) for _ in range(3)]
    with pytest.raises(BusyError, match="requests are in the queue"):
        engine.submit(Request([1], 2))
    for completion in completions:
        list(completion)
    engine.submit(Request([1], 2))


@pytest.mark.parametrize("prompt", [[-1], [50257]])
def test_a_prompt_outside_the_vocabulary_is_refused(tiny_model, prompt):
    with pytest.raises(UserError, match="prompt"):
        Engine(tiny_model).submit(Request(prompt, 1))


def test_non_finite_logits_are_an_error_and_free_the_slot(tiny_model):
    with torch.no_grad():
        tiny_model.transformer["ln_f"].bias[0] = torch.nan
    engine = Engine(tiny_model)
    for _ in range(2):
        with pytest.raises(GPT2Error, match="non-finite"):
            engine.submit(Request([1], 5)).new_tokens()


def test_an_error_of_the_model_fails_only_its_requests(random_model, monkeypatch):
    engine = Engine(random_model)
    monkeypatch.setattr(engine._runner, "prefill", lambda slot, ids, cached=0: 1 / 0)
    with pytest.raises(GPT2Error, match="generation failed: division by zero"):
        list(engine.submit(Request([1], 5)))
    monkeypatch.undo()
    assert len(list(engine.submit(Request([1], 5, stop_token_ids=frozenset())))) == 5


@pytest.fixture
def served(random_model):
    engine = Engine(random_model, slots=3, serving_thread=True)
    thread = threading.Thread(target=engine.serve)
    thread.start()
    yield engine
    engine.close()
    thread.join()


def test_a_serving_thread_completes_concurrent_requests(served, random_model):
    requests = [Request([i], 25, seed=i) for i in range(12)]
    found = [None] * len(requests)

    def consume(i):
        found[i] = ids_of(served.submit(requests[i]))

    clients = [threading.Thread(target=consume, args=(i,)) for i in range(len(requests))]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert found == [ids_of(tokens) for tokens in generate(Engine(random_model), requests)]


def test_a_client_waits_at_most_its_timeout(served):
    completions = [served.submit(Request([1], 100_000, stop_token_ids=frozenset())) for _ in range(3)]
    waiting = served.submit(Request([1], 5))
    start_s = time.monotonic()
    assert waiting.new_tokens(timeout_s=0.1) == []
    assert 0.09 < time.monotonic() - start_s < 5
    for completion in completions:
        completion.cancel()
    assert len(list(waiting)) <= 5
    assert waiting.finish_reason is not None


def test_close_cancels_running_requests(served):
    completion = served.submit(Request([1], 100_000, stop_token_ids=frozenset()))
    assert completion.new_tokens()
    served.close()
    list(completion)
    assert completion.finish_reason == "cancelled"


@pytest.mark.parametrize(
    ("name", "attention", "expected"),
    [
        ("fp32", torch.bfloat16, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        ("int8", torch.float32, torch.float32),
        ("int8", torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_kv_cache_has_the_dtype_of_the_attention(random_model, name, attention, expected, monkeypatch):
    monkeypatch.setattr(quantization, "attention_dtype", lambda: attention)
    engine = Engine(quantize(random_model, name), slots=2)
    assert engine._runner.cache.dtype == expected
    request = Request([1, 2], 30, seed=2, stop_token_ids=frozenset())
    assert [len(tokens) for tokens in generate(engine, [request, replace(request, seed=3)])] == [30, 30]
