import math
import sys
import threading
from itertools import pairwise
from types import ModuleType

import pytest

from gpt2 import tokenizer
from gpt2.errors import BusyError, UserError
from gpt2.inference.engine import Engine, generate
from gpt2.inference.quantization import quantize
from gpt2.inference.request import Request
from space import service
from space.model_files import load_model


@pytest.fixture
def registry(folder):
    engine = Engine(
        quantize(load_model(folder), "fp32"), context_length=16, slots=2, max_queue_size=2, serving_thread=True
    )
    thread = threading.Thread(target=engine.serve)
    thread.start()
    yield service.RequestRegistry(engine)
    engine.close()
    thread.join()


GOOD = {**service.DEFAULTS, "prompt": "The miller", "max_new_tokens": 20, "seed": 3}


def test_streamed_text_matches_the_engine(registry, folder):
    (request,) = service.requests_for(service.validate_settings(GOOD))
    steps = list(registry.generate([request]))
    texts = ["".join(token.text for token in step.samples[0]) for step in steps]
    (expected,) = generate(Engine(quantize(load_model(folder), "fp32"), context_length=16), [request])
    assert [token.id for token in steps[-1].samples[0]] == [token.id for token in expected]
    assert steps[-1].reasons == ["length"]
    assert steps[-1].status_line().startswith("Done: 20 tokens, ")
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


def test_samples_have_consecutive_seeds(registry):
    requests = service.requests_for(service.validate_settings({**GOOD, "samples": 3}))
    assert [request.seed for request in requests] == [3, 4, 5]
    *_, last = registry.generate(requests)
    assert len({tuple(token.id for token in sample) for sample in last.samples}) == 3


def test_an_empty_prompt_and_broken_characters_are_fine(registry):
    for prompt in ("", "\ud800 half a character", "🙂\x00"):
        *_, last = registry.generate(service.requests_for(service.validate_settings({**GOOD, "prompt": prompt})))
        assert last.status_line().startswith("Done")


def test_no_seed_is_a_random_seed():
    seeds = {service.validate_settings({**GOOD, "seed": None})["seed"] for _ in range(5)}
    assert len(seeds) > 1
    assert all(0 <= seed <= service.MAX_SEED for seed in seeds)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt", None),
        ("prompt", ["a"]),
        ("prompt", "a" * 10_001),
        ("max_new_tokens", 0),
        ("max_new_tokens", 501),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", "7"),
        ("max_new_tokens", True),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("temperature", None),
        ("top_k", -1),
        ("top_k", 10**9),
        ("top_k", 10**400),
        ("top_p", 0),
        ("top_p", 1.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", [1]),
        ("samples", 5),
        ("samples", 0),
        ("stop", 5),
        ("stop", "a" * 101),
        ("seed", -1),
        ("seed", 2**31),
        ("seed", {}),
    ],
)
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(UserError, match=r"expected|must be text"):
        service.validate_settings({**GOOD, key: value})


LONG = Request(tokenizer.encode("a"), 100_000, stop_token_ids=frozenset())


def test_a_client_that_disconnects_frees_its_slots(registry):
    for _ in range(3):
        progress = registry.generate([LONG, LONG])
        next(progress)
        progress.close()
    assert registry.engine._running == []


def test_stop_keeps_the_tokens_so_far(registry):
    progress = registry.generate([LONG], "session 1")
    while not next(progress).num_tokens:
        pass
    registry.stop("session 2")
    assert next(progress).reasons == [None]
    registry.stop("session 1")
    *_, last = progress
    assert last.reasons == ["cancelled"]
    assert last.status_line().startswith("Stopped after ")
    assert last.num_tokens > 0


def test_a_session_has_one_generation_at_a_time(registry):
    first, second = registry.generate([LONG], "session 1"), registry.generate([LONG], "session 1")
    next(first)
    next(second)
    *_, last = first
    assert last.reasons == ["cancelled"]
    second.close()


def test_queued_requests_report_their_position(registry):
    generations = [registry.generate([LONG]) for _ in range(4)]
    steps = [next(progress) for progress in generations]
    steps = [next(progress) for progress in generations]
    assert [step.queue_position for step in steps] == [-1, -1, 0, 1]
    assert steps[3].status_line() == "Queued: position 2"
    with pytest.raises(BusyError, match="in the queue"):
        next(registry.generate([LONG]))
    for progress in generations:
        progress.close()
    assert registry.engine._running == []


def test_on_zero_gpu_generate_is_decorated_and_needs_no_thread(folder, monkeypatch):
    decorated = []
    spaces = ModuleType("spaces")
    spaces.GPU = lambda duration: lambda function: decorated.append(duration) or function
    monkeypatch.setitem(sys.modules, "spaces", spaces)
    model = load_model(folder)
    monkeypatch.setattr(type(model), "to", lambda self, device: self)  # there is no GPU here
    generate_on_gpu = service.on_zero_gpu(model, 16)
    *_, last = generate_on_gpu(service.requests_for(service.validate_settings({**GOOD, "samples": 2})), None)
    assert decorated == [60]
    assert [len(sample) for sample in last.samples] == [20, 20]
