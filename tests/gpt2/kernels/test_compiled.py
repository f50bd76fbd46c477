import itertools

import pytest
import torch
from torch import nn

from gpt2.config import DTYPES, GPTConfig
from gpt2.inference.engine import Engine, generate
from gpt2.inference.kv_cache import ModelRunner
from gpt2.inference.quantization import fastest_dtype, quantize
from gpt2.inference.request import Request, Sampling
from gpt2.inference.speculation import Drafter
from gpt2.kernels import compiled, library
from gpt2.kernels.library import CompileError
from gpt2.model.transformer import GPT
from tests.conftest import needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("optimized")]
PROMPT = list(range(40))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=96, vocab_size=1001, n_layer=2, n_head=2, n_embd=128)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


def texts(engine, requests):
    return [[token.id for token in tokens] for tokens in generate(engine, requests)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compiled_step_has_the_logits_of_the_dequantized_weights(model, dtype):
    ids = torch.randint(1001, (40,)).tolist()
    quantized = quantize(model, dtype)
    runner = ModelRunner(quantized, slots=2, context_length=48)
    assert runner.attach_compiled(), runner.problem
    found = torch.cat([runner.decode_compiled([1], [[token]])[0][0] for token in ids])
    reference = GPT(model.config)
    reference.load_state_dict(model.state_dict())
    for name, module in reference.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = quantized.get_submodule(name.rpartition(".")[0])
            module.weight = nn.Parameter(vars(layer)[name.rpartition(".")[2]].weights.dequantized())
    with torch.inference_mode():
        expected = reference.hidden(torch.tensor([ids])) @ quantized.lm_head.weights.dequantized().T
    assert (found - expected[0]).norm() / expected.norm() < {"fp32": 2e-3, "bf16": 0.01}.get(dtype, 0.03)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_text_is_the_same_to_the_bit_alone_and_in_company(model, dtype):
    requests = [Request(PROMPT[: 3 + 5 * i], 30, Sampling(top_k=200), seed=i) for i in range(7)]
    quantized = quantize(model, dtype)
    alone = [generate(Engine(quantized, speculate=False), [request])[0] for request in requests]
    assert Engine(quantized).path == "compiled"
    assert generate(Engine(quantized, slots=7), requests) == alone  # with their log probabilities


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_prefill_is_followed_by_the_logits_of_the_compiled_decode(model, dtype):
    ids = torch.randint(1001, (78,)).tolist()  # no multiple of a panel
    runner = ModelRunner(quantize(model, dtype), slots=3, context_length=80)
    assert runner.attach_compiled()
    cache = runner.compiled.cache.zero_()
    expected = [runner.decode_compiled([1], [[token]])[0][0] for token in ids][-1]
    cache[1] = 255
    runner.prefill_compiled(1, ids[:-1])
    found = runner.decode_compiled([1], [ids[-1:]])[0][0]
    assert (found - expected).norm() / expected.norm() < {"fp32": 1e-5, "bf16": 0.01}.get(dtype, 0.03)
    assert not cache[0].any()
    assert not cache[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_how_a_prompt_is_divided_changes_nothing(model, dtype):
    ids = torch.randint(1001, (90,)).tolist()
    runner = ModelRunner(quantize(model, dtype), slots=1, context_length=96)
    assert runner.attach_compiled()
    threads, caches = torch.get_num_threads(), []
    try:
        for parts in ([90], [1, 89], [31, 33, 26], [64, 26]):
            torch.set_num_threads(1 + len(parts))
            runner.compiled.cache.fill_(255)
            for first, end in itertools.pairwise(itertools.accumulate(parts, initial=0)):
                runner.prefill_compiled(0, ids[first:end], cached=first)
            caches.append(runner.compiled.cache.clone())
    finally:
        torch.set_num_threads(threads)
    assert runner.lengths == [90]
    assert all(torch.equal(caches[0], other) for other in caches[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_rows_gives_the_same_bits(dtype):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=1001, n_layer=2, n_head=3, n_embd=192)).eval()
    runner = ModelRunner(quantize(model, dtype), slots=21, context_length=16)
    assert runner.attach_compiled()
    tokens = torch.randint(1001, (21,)).tolist()
    alone = []
    for slot, token in enumerate(tokens):
        runner.lengths[slot] = 0
        (logits,), (total,) = runner.decode_compiled([slot], [[token]])
        assert float(total) == pytest.approx(float(logits.logsumexp(1)), abs=1e-5)
        alone.append((logits, total))
    for rows in (2, 3, 4, 5, 7, 8, 16, 21):
        runner.lengths = [0] * 21
        together = runner.decode_compiled(range(rows), [[token] for token in tokens[:rows]])
        for logits, total, (own_logits, own_total) in zip(*together, alone[:rows], strict=True):
            assert torch.equal(logits, own_logits), rows
            assert torch.equal(total, own_total), rows


def test_any_number_of_threads_gives_the_same_bits(model):
    runner = ModelRunner(quantize(model, "int8"), slots=1, context_length=16)
    assert runner.attach_compiled()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            runner.lengths = [0]
            found.append(torch.cat([part[0].view(-1) for part in runner.decode_compiled([0], [[1, 2, 3, 4, 5]])]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0.7, repetition_penalty=1.3)])
@pytest.mark.parametrize("length", [40, 90])  # 90: the window moves
@pytest.mark.parametrize("dtype", DTYPES)
def test_drafts_do_not_change_the_text(model, dtype, sampling, length, monkeypatch):
    request = Request([1, 2, 3, 4, 5, 6], length, sampling, seed=3, stop_token_ids=frozenset())
    quantized = quantize(model, dtype)
    (expected,) = generate(Engine(quantized, context_length=64, speculate=False), [request])
    text = [*request.prompt, *(token.id for token in expected)]
    sizes = []

    def propose(self, ids, limit, seconds):  # sometimes right to the end, sometimes not
        draft = text[len(ids) :][: min(limit, 1 + len(ids) % 7)]
        return [*draft[:-1], 7] if len(ids) % 3 else draft

    decode = ModelRunner.decode_compiled
    monkeypatch.setattr(Drafter, "propose", propose)
    monkeypatch.setattr(ModelRunner, "decode_compiled", lambda *a: (sizes.append(len(a[2][0])), decode(*a))[1])
    engine = Engine(quantized, context_length=64)
    sizes.clear()  # of the measurement
    (found,) = generate(engine, [request])
    assert found == expected
    assert max(sizes) > 4
    assert len(sizes) < length


def test_damaged_weights_give_an_error_in_every_dtype(model):
    for dtype in DTYPES:
        damaged = GPT(model.config)
        damaged.load_state_dict(model.state_dict())
        with torch.no_grad():
            damaged.transformer["h"][1].ln_2.weight[3] = torch.nan
        engine = Engine(quantize(damaged, dtype))
        completion = engine.submit(Request([1, 2], 5))
        with pytest.raises(Exception, match="non-finite logits; its weights are damaged"):
            list(completion)


def test_what_is_not_there_is_refused(model):
    runner = ModelRunner(quantize(model, "fp32"), slots=2, context_length=8)
    assert runner.attach_compiled()
    for slot, token, position in ((2, 0, 0), (0, 1001, 0), (0, -1, 0), (0, 0, 8)):
        with pytest.raises(IndexError, match="does not exist"):
            runner.compiled.decode([slot], [token], [position])
        with pytest.raises(IndexError, match="does not exist"):
            runner.compiled.prefill(slot, [token], position)
    with pytest.raises(IndexError, match="does not exist"):
        runner.compiled.prefill(0, [0] * 5, 4)


def test_sizes_that_do_not_fit_into_vectors_use_pytorch():
    narrow = GPT(GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=1, n_embd=48))
    engine = Engine(quantize(narrow, "int8"))
    assert engine.path.startswith("PyTorch")
    assert len(generate(engine, [Request([1], 5)])[0]) == 5


def test_a_step_that_computes_something_else_is_not_used(model, monkeypatch):
    wrong = lambda self, slots, *_: (torch.randn(len(slots), self._vocab_size), torch.zeros(len(slots)))  # noqa: E731
    monkeypatch.setattr(compiled.CompiledModel, "decode", wrong)
    engine = Engine(quantize(model, "fp32"))
    assert engine.path.startswith("PyTorch: the compiled kernels differ from PyTorch by ")
    with pytest.raises(CompileError, match="the compiled kernels are wrong on this CPU: fp32 differs by"):
        compiled.check(library.load(library.library_path()))


def test_the_dtype_is_chosen_with_the_compiled_step(model):
    assert fastest_dtype(model) in ("fp32", "bf16", "int8")
    assert fastest_dtype(model, ("int4",)) == "int4"


def test_a_text_that_began_before_the_step_was_there_stays_with_pytorch(model, monkeypatch):
    quantized = quantize(model, "fp32")
    with monkeypatch.context() as patch:
        patch.setattr(library.Path, "is_file", lambda self: False)
        patch.setattr(library, "start_build", _EndedBuild)
        engine = Engine(quantized, slots=2)
    assert engine.path == "PyTorch: the kernels are being compiled"
    early = engine.submit(Request([1], 20))
    engine.step()
    assert engine.wait_until_compiled(1)
    late = engine.submit(Request([1], 20))
    assert [token.id for token in early] == [token.id for token in late]


class _EndedBuild:
    def has_ended(self, timeout_s):
        return True

    def problem(self):
        return ""


def test_a_prompt_of_one_token_does_not_see_what_was_in_its_slot(model):
    quantized = quantize(model, "fp32")
    request = Request([7], 20, Sampling(temperature=1.0), seed=3)
    expected = generate(Engine(quantized, context_length=64), [request])
    engine = Engine(quantized, context_length=64)
    assert engine.path == "compiled"
    for fill in (engine.warm_up, lambda: generate(engine, [Request(list(range(10)), 50, Sampling(), seed=1)])):
        fill()
        assert generate(engine, [request]) == expected
