"""evaluate: the best model's scores on held-out text, samples, and a picture of what surprises it."""

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from gpt2.config import EvaluateConfig
from gpt2.data import Tokens, open_tokens
from gpt2.files import write_json, write_text
from stages import paths, tracking
from stages.params import Params, load_params
from stages.process import Stop, run_stage, say

if TYPE_CHECKING:
    from gpt2.model import GPT

PROMPTS_FROM_TOKENS = 100_000
SAMPLES_AT_ONCE = 8


def main(stop: Stop) -> None:
    """Checks the params, then evaluates."""
    params = load_params(paths.PARAMS)
    with tracking.open_run(params, "evaluate", tracking.read_names(), stop) as run:
        metrics = evaluate(params, stop)
        run.metrics(0, {f"evaluate/{key}": value for key, value in metrics.items()})
        run.files(sorted(paths.EVALUATE_REPORT.iterdir()), "reports/evaluate")
    say(
        f"{paths.EVALUATE_REPORT}: validation loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.1f}, "
        f"{metrics['bits_per_byte']:.3f} bits per byte"
    )


def evaluate(params: Params, stop: Stop) -> dict[str, float]:
    """Writes reports/evaluate/; gives its metrics."""
    with stop.nothing_to_lose():
        from tqdm import tqdm

        from gpt2 import evaluation, tokenizer
        from gpt2.checkpoint import load_model, trained_length
        from gpt2.device import choose_device, prepare
        from gpt2.generation import prompts_from
        from stages import reports

    device = choose_device(params.runtime.device)
    prepare(device)
    config = params.evaluate
    train_tokens, val_tokens = open_tokens(paths.TOKENS, "train"), open_tokens(paths.TOKENS, "val")
    model = load_model(paths.MODELS).to(device)
    sequence_length = trained_length(paths.MODELS) or model.config.block_size

    bar = partial(tqdm, unit="token", unit_scale=True, disable=None, leave=False)

    with bar(total=len(val_tokens) - 1, desc="scoring") as progress:
        scores = evaluation.score(
            model,
            val_tokens,
            sequence_length=sequence_length,
            batch_size=config.batch_size,
            progress=stop.watched(progress.update),
        )
    prompts = config.prompts or prompts_from(tokenizer.decode(val_tokens[:PROMPTS_FROM_TOKENS].tolist()))
    samples = draw_samples(config, model, prompts, sequence_length, stop)
    with bar(total=len(train_tokens), desc="searching the training text") as progress:
        verbatim = evaluation.longest_verbatim(samples, train_tokens, progress=stop.watched(progress.update))
    metrics = {**asdict(scores), "longest_verbatim_characters": len(verbatim)}
    write_json(paths.EVALUATE_REPORT / "metrics.json", metrics)
    pairs = [{"prompt": prompt, "sample": sample} for prompt, sample in zip(prompts, samples, strict=True)]
    write_json(paths.EVALUATE_REPORT / "samples.json", pairs)
    description = describe_samples(config, prompts, samples, verbatim, metrics["loss"])
    write_text(paths.EVALUATE_REPORT / "samples.md", description)
    passage = middle(val_tokens, config.passage_tokens)
    losses = evaluation.token_losses(model, passage, sequence_length=sequence_length)
    reports.draw_passage([tokenizer.decode([int(t)]) for t in passage], losses, paths.EVALUATE_REPORT / "passage.png")
    return metrics


def draw_samples(config: EvaluateConfig, model: "GPT", prompts: list[str], context: int, stop: Stop) -> list[str]:
    """A continuation of each prompt, as the Space would give it."""
    from tqdm import tqdm

    from gpt2 import tokenizer
    from gpt2.engine import Engine
    from gpt2.formats import in_format
    from gpt2.generation import BLANK_PROMPT, Request, Sampling

    sampling = Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    # fp32, whatever is fastest here: the samples are to be the same on the next machine
    engine = Engine(in_format(model, "fp32"), context=context, slots=min(len(prompts), SAMPLES_AT_ONCE))
    replies = [
        engine.submit(
            Request(
                tokenizer.encode(prompt or BLANK_PROMPT), config.max_new_tokens, sampling, seed=config.seed + number
            )
        )
        for number, prompt in enumerate(prompts)
    ]
    total = len(prompts) * config.max_new_tokens
    with tqdm(total=total, desc="writing samples", unit="token", disable=None, leave=False) as bar:
        while engine.step():
            stop.check()
            bar.update(engine.tokens_written - bar.n)
    return ["".join(token.text for token in reply) for reply in replies]


def describe_samples(config: EvaluateConfig, prompts: list[str], samples: list[str], verbatim: str, loss: float) -> str:
    """The samples as Markdown."""
    parts = [
        "# Samples",
        f"Validation loss {loss:.4f} nats per token. {config.max_new_tokens} tokens for each prompt, "
        f"temperature {config.temperature}, top-k {config.top_k}, top-p {config.top_p}, seeds from {config.seed} on. "
        "The prompt is in bold.",
        f"The longest passage of them that stands to the letter in the training text has {len(verbatim)} characters"
        + (f": `{' ⏎ '.join(verbatim.split(chr(10)))}`" if verbatim else ""),
    ]
    for prompt, sample in zip(prompts, samples, strict=True):
        shown_prompt = prompt.strip().replace("\n", " ⏎ ") or "(empty)"
        body = "\n".join(f"    {line}" for line in sample.split("\n"))
        parts.append(f"## **{shown_prompt}**\n\n{body.rstrip()}")
    return "\n\n".join(parts) + "\n"


def middle(tokens: Tokens, length: int) -> Tokens:
    """`length` tokens, or all if there are fewer, from the middle of a text."""
    start = max(0, (len(tokens) - length) // 2)
    return np.asarray(tokens[start : start + length])


if __name__ == "__main__":
    run_stage(main)
