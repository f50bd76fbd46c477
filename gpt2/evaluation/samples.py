"""Samples of a trained model."""

from collections.abc import Sequence

from gpt2 import tokenizer
from gpt2.inference.engine import Engine
from gpt2.inference.quantization import quantize
from gpt2.inference.request import BLANK_PROMPT, Request, Sampling
from gpt2.model.transformer import GPT
from gpt2.progress import ProgressCallback, no_progress

MAX_BATCH = 8


def generate_samples(
    model: GPT,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    seed: int,
    context_length: int,
    progress: ProgressCallback = no_progress,
) -> list[str]:
    """A continuation of each prompt; the seeds are `seed`, `seed` + 1, ...

    Always in fp32, so that every machine generates the same samples.
    """
    slots = min(len(prompts), MAX_BATCH)
    engine = Engine(quantize(model, "fp32"), context_length=context_length, slots=slots, optimize=False)
    completions = [
        engine.submit(Request(tokenizer.encode(prompt or BLANK_PROMPT), max_new_tokens, sampling, seed=seed + number))
        for number, prompt in enumerate(prompts)
    ]
    reported = 0
    while engine.step():
        progress(engine.num_generated_tokens - reported)
        reported = engine.num_generated_tokens
    return ["".join(token.text for token in completion) for completion in completions]


def prompts_from(text: str, count: int = 3, words: int = 3) -> list[str]:
    """The first words of `count` lines, evenly spaced over a text. Deterministic."""
    lines = [line.split() for line in text.splitlines() if len(line.split()) > words] or [text.split()]
    chosen = [lines[len(lines) * (2 * i + 1) // (2 * count)] for i in range(count)]
    return list(dict.fromkeys(" ".join(line[:words]) for line in chosen))
