"""What is measured: our engine and its peers, on the same tasks."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.generation import llama_cpp, machine, peers
from benchmarks.generation.peers import Model

PROMPT = list(range(100, 116))
LONG_PROMPT = 512
TASKS = {
    "1 x 100": (1, 100),
    "1 x 400": (1, 400),
    "8 x 100": (8, 100),
    "8 x 400": (8, 400),
}
FIRST = f"time to first token after {LONG_PROMPT}, ms"
POSITIONS = {"at position 50": 50, "at position 1000": 1000}
PRODUCTS = "products alone, ms per token"
AROUND = 10
"""The speed at a position is that of the tokens up to so many before and after it."""
LOSS_TOKENS = 8192
CONTENDERS = {
    "ours, fp32": ("ours", "fp32"),
    "ours, bf16": ("ours", "bf16"),
    "ours, int8": ("ours", "int8"),
    "ours, int4": ("ours", "int4"),
    "Transformers, fp32": ("transformers", "float32"),
    "Transformers, bf16": ("transformers", "bfloat16"),
    "CTranslate2, fp32": ("ctranslate2", "float32"),
    "CTranslate2, int8": ("ctranslate2", "int8"),
    "llama.cpp, f32": ("llama_cpp", "f32"),
    "llama.cpp, bf16": ("llama_cpp", "bf16"),
    "llama.cpp, q8_0": ("llama_cpp", "q8_0"),
    "llama.cpp, q4_0": ("llama_cpp", "q4_0"),
    "llama.cpp, q4_K_M": ("llama_cpp", "q4_K_M"),
    "llama.cpp with BLAS, f32": ("llama_cpp_with_blas", "f32"),
    "llama.cpp with BLAS, bf16": ("llama_cpp_with_blas", "bf16"),
    "llama.cpp with BLAS, q8_0": ("llama_cpp_with_blas", "q8_0"),
    "OpenVINO, fp32": ("openvino", "fp32"),
    "OpenVINO, bf16": ("openvino", "bf16"),
    "OpenVINO, bf16, not fused": ("openvino", "bf16, not fused"),
    "OpenVINO, int8": ("openvino", "int8"),
    "OpenVINO, int8, bf16 hint": ("openvino", "int8, bf16 hint"),
    "OpenVINO, int4": ("openvino", "int4"),
    "OpenVINO, int4, bf16 hint": ("openvino", "int4, bf16 hint"),
    "baseline loop, fp32": ("loop", "float32"),
}
BITS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.0}
"""Bits per weight of Transformers and CTranslate2. The others say themselves how many bytes they read."""


def ours(folder: Path, precision: str) -> Model:
    """Our engine."""
    import torch

    from gpt2 import device
    from gpt2.inference import engine as inference
    from gpt2.inference.quantization import quantize
    from gpt2.inference.request import Request, Sampling
    from gpt2.kernels.linear import linear_layers
    from gpt2.model.storage import load_folder

    device.configure_device(torch.device("cpu"))
    model = quantize(load_folder(folder), precision)
    # drafts would gain from the loops of random weights
    engine = inference.Engine(model, slots=8, speculate=False)
    engine.wait_until_compiled(60)

    def request(prompt: list[int], tokens: int) -> Request:
        return Request(prompt, tokens, Sampling(temperature=0), stop_token_ids=frozenset())

    def generate(prompt: list[int], batch: int, tokens: int) -> list[list[int]]:
        generated = inference.generate(engine, [request(prompt, tokens)] * batch)
        return [[token.id for token in each] for each in generated]

    def stream(prompt: list[int], tokens: int) -> Iterator[Any]:
        return iter(engine.submit(request(prompt, tokens)))

    compiled = engine._runner.compiled
    multiply = None if compiled is None else partial(compiled.multiply, 1)
    parts = [part for layer in linear_layers(model) for part in (layer.weights.weight, layer.weights.scale)]
    facts = {
        "version": f"{machine.commit()}, {peers.versions('torch')}",
        "weight_bytes": float(sum(part.nbytes for part in parts if part is not None)),
    }
    return Model(generate, stream=stream, multiply=multiply, facts=facts)


def our_loss(folder: Path, precision: str, tokens: Any, context_length: int) -> float:
    """Nats per token of our model in a dtype, with the compiled kernels, or else with PyTorch's."""
    import torch
    import torch.nn.functional as F

    from gpt2.evaluation.scores import score
    from gpt2.inference.kv_cache import ModelRunner
    from gpt2.inference.quantization import quantize
    from gpt2.model.storage import load_folder

    model = quantize(load_folder(folder), precision)
    compiled = ModelRunner(model, slots=1, context_length=context_length).load_compiled()
    if compiled is None:
        return score(model, tokens, sequence_length=context_length, batch_size=8).loss
    total, ids = 0.0, torch.from_numpy(tokens.astype("int64"))
    for first in range(0, len(ids) - 1, context_length):
        window = ids[first : first + context_length + 1]
        count = len(window) - 1
        logits, _ = compiled.decode([0] * count, window[:-1].tolist(), range(count))
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
    return total / (len(ids) - 1)


MAKERS: dict[str, Callable[[Path, str], Model]] = {
    "ours": ours,
    "transformers": peers.transformers,
    "ctranslate2": peers.ctranslate2,
    "llama_cpp": peers.llama_cpp,
    "llama_cpp_with_blas": peers.llama_cpp_with_blas,
    "openvino": peers.openvino,
    "loop": peers.loop,
}
LOSSES: dict[str, Callable[[Path, str, Any, int], float]] = {
    "ours": our_loss,
    "llama_cpp": llama_cpp.loss,
    "llama_cpp_with_blas": llama_cpp.loss,
}


def prepare(folder: Path, trained: Path | None = None, tokens: Path | None = None) -> None:
    """Writes what all contenders load: random weights of GPT-2 124M; a trained model and held-out tokens, if given."""
    import torch

    from gpt2.config import PRESETS
    from gpt2.data.token_files import open_tokens
    from gpt2.hub.export import save_pretrained
    from gpt2.model.storage import save_weights
    from gpt2.model.transformer import GPT

    torch.manual_seed(0)
    model = GPT(PRESETS["gpt2"])
    (folder / "hf").mkdir()
    save_pretrained(model, folder / "hf")
    save_weights(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()), encoding="utf-8")
    if trained and tokens:
        (folder / "trained").mkdir()
        for name in ("model.safetensors", "config.json", "run.json"):
            shutil.copy(trained / name, folder / "trained")
        open_tokens(tokens, "val")[:LOSS_TOKENS].tofile(folder / "trained/tokens.bin")


def work(name: str, folder: Path) -> dict[str, Any]:
    """The results of one contender, and facts about it."""
    kind, precision = CONTENDERS[name]
    model = MAKERS[kind](folder, precision)
    found: dict[str, Any] = {}
    if kind in ("transformers", "ctranslate2"):
        found["weight_bytes"] = matrix_weights(folder) * BITS[precision] / 8
    found |= model.facts
    for task, (batch, tokens) in TASKS.items():
        if (batch > 1 and not model.batched) or (kind == "loop" and tokens > 100):
            continue
        assert [len(ids) for ids in model.generate(PROMPT, batch, 8)] == [8] * batch
        found[task] = batch * tokens / least(seconds_of, model.generate, PROMPT, batch, tokens)
    long_prompt = [(7919 * i) % 50_000 for i in range(max(LONG_PROMPT, *POSITIONS.values()))]
    found[FIRST] = 1000 * least(seconds_of, model.generate, long_prompt[:LONG_PROMPT], 1, 1)
    for task, position in POSITIONS.items():
        if model.stream:
            found[task] = 2 * AROUND / least(seconds_around, model.stream, long_prompt[: position - 2 * AROUND])
    if model.multiply:
        found[PRODUCTS] = 1000 * least(seconds_of_products, model.multiply) / (2 * AROUND)
    if kind in LOSSES and (folder / "trained").is_dir():
        found["loss"] = trained_loss(LOSSES[kind], folder / "trained", precision)
    return found


def seconds_of(generate: peers.Generate, prompt: list[int], batch: int, tokens: int) -> float:
    """Seconds of one call."""
    start_s = time.perf_counter()
    generate(prompt, batch, tokens)
    return time.perf_counter() - start_s


def seconds_around(stream: peers.Stream, prompt: list[int]) -> float:
    """Seconds for the 2 * AROUND tokens that follow the first AROUND + 1 after a prompt."""
    times_s = [time.perf_counter() for _ in stream(prompt, 3 * AROUND + 1)]
    return times_s[-1] - times_s[AROUND]


def seconds_of_products(multiply: Callable[[], None]) -> float:
    """Seconds of the matrix products of as many tokens as `seconds_around` measures."""
    start_s = time.perf_counter()
    for _ in range(2 * AROUND):
        multiply()
    return time.perf_counter() - start_s


def least(measure: Callable[..., float], *arguments: Any) -> float:
    """The least of up to five results, in about five seconds."""
    start_s = time.perf_counter()
    results: list[float] = []
    while len(results) < 5 and (not results or time.perf_counter() < start_s + 5):
        results.append(measure(*arguments))
    return min(results)


def matrix_weights(folder: Path) -> int:
    """Number of weights that a token is multiplied with: of all linear layers and of the head, without biases."""
    from gpt2.config import GPTConfig

    config = GPTConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd


def trained_loss(measure: Callable[[Path, str, Any, int], float], folder: Path, precision: str) -> float:
    """Nats per token of the trained model on held-out tokens, in windows of the length that it was trained on."""
    import numpy as np

    from gpt2.data.token_files import TOKEN_TYPE
    from gpt2.model.storage import load_folder, trained_context_length

    length = trained_context_length(folder) or load_folder(folder).config.block_size
    return measure(folder, precision, np.fromfile(folder / "tokens.bin", dtype=TOKEN_TYPE), length)
