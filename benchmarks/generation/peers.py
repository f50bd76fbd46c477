"""The implementations beside ours, each as its users run it: functions from a folder and a precision to a `Model`."""

import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Generate = Callable[[list[int], int, int], list[list[int]]]
"""Arguments: a prompt, a batch size, and a number of tokens per sequence. Returns the new tokens of each sequence."""
Stream = Callable[[list[int], int], Iterator[Any]]
"""Arguments: a prompt and a number of tokens. Yields once for each new token of one sequence, when it is known."""
BLAS = "LLAMA_CPP_BLAS"
"""Environment variable: the folder with the shared libraries of a llama.cpp that is built with BLAS."""


@dataclass(frozen=True)
class Model:
    """A model that is ready to generate.

    multiply: computes the matrix products of a token, and nothing else. facts: what the report says about it, besides
    its speed.
    """

    generate: Generate
    batched: bool = True
    stream: Stream | None = None
    multiply: Callable[[], None] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def versions(*packages: str) -> str:
    """Names and versions of packages."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def transformers(folder: Path, precision: str) -> Model:
    """`generate` of Hugging Face's Transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(folder / "hf"), dtype=getattr(torch, precision))

    def generate(prompt: list[int], batch: int, tokens: int) -> list[list[int]]:
        idx = torch.tensor([prompt] * batch)
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        found = model.generate(idx, attention_mask=torch.ones_like(idx), **options)
        return [row[len(prompt) :] for row in found.tolist()]

    return Model(generate, facts={"version": versions("transformers", "torch")})


def ctranslate2(folder: Path, precision: str) -> Model:
    """OpenNMT's CTranslate2."""
    if precision == "float32":
        os.environ["CT2_PACKED_GEMM"] = "0"  # packed weights take 1.5 times as long to decode in fp32; in 8 bits, less
    import ctranslate2 as ct2
    import torch
    from ctranslate2.converters import TransformersConverter

    from gpt2.tokenizer import vocabulary_files

    if not (folder / "ct2").is_dir():
        TransformersConverter(str(folder / "hf")).convert(str(folder / "ct2"))
    threads = torch.get_num_threads()
    model = ct2.Generator(str(folder / "ct2"), compute_type=precision, intra_threads=threads, inter_threads=1)
    names = {i: name for name, i in json.loads(vocabulary_files()[1].read_text(encoding="utf-8")).items()}

    def generate(prompt: list[int], batch: int, tokens: int) -> list[list[int]]:
        prompts = [[names[i] for i in prompt]] * batch
        options = {"max_length": tokens, "min_length": tokens, "beam_size": 1, "sampling_topk": 1}
        found = model.generate_batch(prompts, include_prompt_in_result=False, **options)
        return [result.sequences_ids[0] for result in found]

    return Model(generate, facts={"version": versions("ctranslate2")})


def llama_cpp(folder: Path, precision: str) -> Model:
    """llama.cpp: one sequence, or eight in a batch, through the low-level functions of llama-cpp-python."""
    from benchmarks.generation.llama_cpp import Decoder, gguf_file, load, system_info, tensor_types

    path = gguf_file(folder, precision)
    model = load(path)
    decoders: dict[int, Decoder] = {}

    def decoder(batch: int) -> Decoder:
        if batch not in decoders:
            decoders[batch] = Decoder(model, batch)
        return decoders[batch]

    def generate(prompt: list[int], batch: int, tokens: int) -> list[list[int]]:
        return [list(ids) for ids in zip(*decoder(batch).stream(prompt, batch, tokens), strict=True)]

    def stream(prompt: list[int], tokens: int) -> Iterator[Any]:
        return decoder(1).stream(prompt, 1, tokens)

    facts = {
        "version": f"{versions('llama-cpp-python')} ({system_info()})",
        "weight_bytes": sum(tensor_types(path).values()),
    }
    return Model(generate, stream=stream, facts=facts)


def llama_cpp_with_blas(folder: Path, precision: str) -> Model:
    """llama.cpp from the folder that $LLAMA_CPP_BLAS names. Raises RuntimeError if there is none."""
    libraries = os.environ.get(BLAS, "")
    if not libraries or not list(Path(libraries).glob("libggml-blas*")):
        raise RuntimeError(f"{BLAS} names no folder with libggml-blas")
    os.environ["LLAMA_CPP_LIB_PATH"] = libraries  # of llama-cpp-python, when it is imported
    model = llama_cpp(folder, precision)
    return replace(model, facts=model.facts | {"version": f"{model.facts['version']} with BLAS"})


def openvino(folder: Path, precision: str) -> Model:
    """OpenVINO, with the KV cache in the graph, as optimum-intel exports models."""
    from benchmarks.generation.openvino import Decoder
    from gpt2.model.storage import load_folder

    decoder = Decoder(load_folder(folder), precision)

    def generate(prompt: list[int], batch: int, tokens: int) -> list[list[int]]:
        return [list(ids) for ids in zip(*decoder.stream(prompt, batch, tokens), strict=True)]

    def stream(prompt: list[int], tokens: int) -> Iterator[Any]:
        return decoder.stream(prompt, 1, tokens)

    facts = {"version": versions("openvino", "nncf"), "weight_bytes": decoder.weight_bytes}
    return Model(generate, stream=stream, facts=facts)


def loop(folder: Path, precision: str) -> Model:
    """The baseline: all logits of the whole context for each token, top-k 50."""
    import torch

    from gpt2.model.storage import load_folder

    model = load_folder(folder)

    def generate(prompt: list[int], batch: int, tokens: int) -> list[list[int]]:
        idx = torch.tensor([prompt] * batch)
        with torch.no_grad():
            for _ in range(tokens):
                probs = model(idx)[0][:, -1].softmax(-1)
                values, ids = probs.topk(50, dim=-1)
                idx = torch.cat([idx, ids.gather(1, torch.multinomial(values, 1))], dim=1)
        return [row[len(prompt) :] for row in idx.tolist()]

    return Model(generate, batched=False, facts={"version": versions("torch")})
