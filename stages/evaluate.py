"""evaluate: scores the best model on held-out text, generates samples, and plots the loss of each token."""

from dataclasses import asdict
from functools import partial

from gpt2.config import EvaluateConfig
from gpt2.data.token_files import TokenArray, Tokens, open_tokens
from gpt2.files import write_json, write_text
from stages import paths, tracking
from stages.cores import reserve_cores
from stages.params import Params, load_params
from stages.process import StopSignal, echo, run_stage

PROMPTS_FROM_TOKENS = 100_000


def main(stop: StopSignal) -> None:
    """Checks the params, then evaluates."""
    params = load_params(paths.PARAMS)
    ids = tracking.read_run_ids()
    with tracking.start_run(params, "evaluate", ids, stop) as run:
        with reserve_cores(params.runtime, stop):
            metrics = evaluate(params, stop)
        run.metrics(0, {f"evaluate/{key}": value for key, value in metrics.items()})
        run.files(sorted(paths.EVALUATE_REPORT.iterdir()), "reports/evaluate")
    echo(
        f"{paths.EVALUATE_REPORT}: validation loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.1f}, "
        f"{metrics['bits_per_byte']:.3f} bits per byte"
    )


def evaluate(params: Params, stop: StopSignal) -> dict[str, float]:
    """Scores the model and generates samples. Writes reports/evaluate/; returns its metrics."""
    with stop.exit_immediately():
        from tqdm import tqdm

        from gpt2 import tokenizer
        from gpt2.device import choose_device, configure_device
        from gpt2.evaluation.memorization import longest_verbatim
        from gpt2.evaluation.samples import generate_samples, prompts_from
        from gpt2.evaluation.scores import score, token_losses
        from gpt2.inference.request import Sampling
        from gpt2.model.storage import load_folder, trained_context_length
        from stages import reports

    config, folder = params.evaluate, paths.EVALUATE_REPORT
    device = choose_device(params.runtime.device)
    configure_device(device, params.runtime.threads)
    train_tokens, val_tokens = open_tokens(paths.TOKENS, "train"), open_tokens(paths.TOKENS, "val")
    model = load_folder(paths.MODELS).to(device)
    context_length = trained_context_length(paths.MODELS) or model.config.block_size
    prompts = config.prompts or prompts_from(tokenizer.decode(val_tokens[:PROMPTS_FROM_TOKENS].tolist()))
    bar = partial(tqdm, unit="token", unit_scale=True, disable=None, leave=False)

    with bar(total=len(val_tokens) - 1, desc="scoring") as progress:
        scores = score(
            model,
            val_tokens,
            sequence_length=context_length,
            batch_size=config.batch_size,
            progress=stop.wrap(progress.update),
        )
    with bar(total=len(prompts) * config.max_new_tokens, desc="generating samples") as progress:
        samples = generate_samples(
            model,
            prompts,
            Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p),
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            context_length=context_length,
            progress=stop.wrap(progress.update),
        )
    with bar(total=len(train_tokens), desc="searching for verbatim copies") as progress:
        verbatim = longest_verbatim(samples, train_tokens, progress=stop.wrap(progress.update))

    metrics = {**asdict(scores), "longest_verbatim_characters": len(verbatim)}
    write_json(folder / "metrics.json", metrics)
    pairs = [{"prompt": prompt, "sample": sample} for prompt, sample in zip(prompts, samples, strict=True)]
    write_json(folder / "samples.json", pairs)
    write_text(folder / "samples.md", describe_samples(config, prompts, samples, verbatim, metrics["loss"]))
    passage = middle(val_tokens, config.passage_tokens)
    losses = token_losses(model, passage, sequence_length=context_length)
    reports.draw_passage([tokenizer.decode([int(t)]) for t in passage], losses, folder / "passage.png")
    return metrics


def describe_samples(config: EvaluateConfig, prompts: list[str], samples: list[str], verbatim: str, loss: float) -> str:
    """The samples as Markdown."""
    parts = [
        "# Samples",
        f"Validation loss {loss:.4f} nats per token. {config.max_new_tokens} tokens for each prompt, "
        f"temperature {config.temperature}, top-k {config.top_k}, top-p {config.top_p}, seeds from {config.seed} on. "
        "The prompt is in bold.",
        f"The longest passage copied verbatim from the training text has {len(verbatim)} characters"
        + (f": `{' ⏎ '.join(verbatim.split(chr(10)))}`" if verbatim else ""),
    ]
    for prompt, sample in zip(prompts, samples, strict=True):
        shown_prompt = prompt.strip().replace("\n", " ⏎ ") or "(empty)"
        body = "\n".join(f"    {line}" for line in sample.split("\n"))
        parts.append(f"## **{shown_prompt}**\n\n{body.rstrip()}")
    return "\n\n".join(parts) + "\n"


def middle(tokens: Tokens, length: int) -> TokenArray:
    """`length` tokens, or all if there are fewer, from the middle of a text."""
    start = max(0, (len(tokens) - length) // 2)
    return tokens[start : start + length]


if __name__ == "__main__":
    run_stage(main)
