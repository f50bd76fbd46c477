"""evaluate: scores the best model on held-out text and on tasks, plots where its loss comes from, generates samples."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2.data.token_files import TokenArray, Tokens, open_tokens, read_index, split_sha256
from gpt2.files import write_json, write_text
from stages import paths, tracking
from stages.cores import reserve_cores
from stages.params import Params, load_params
from stages.process import StopSignal, echo, run_stage
from stages.segment_losses import SegmentLosses

if TYPE_CHECKING:
    from gpt2.model.transformer import GPT

PROMPTS_FROM_TOKENS = 100_000
CLOZE = "cloze"
"""The task of our own; all others are those of lm-evaluation-harness."""


def main(stop: StopSignal) -> None:
    """Checks the params, then evaluates."""
    params = load_params(paths.PARAMS)
    ids = tracking.read_run_ids()
    with tracking.start_run(params, "evaluate", ids, stop) as run:
        with reserve_cores(params.runtime, stop):
            metrics = evaluate(params, stop)
        run.metrics(0, {f"evaluate/{key}": value for key, value in metrics.items()})
        run.files(sorted(paths.EVALUATE_REPORT.iterdir()), "reports/evaluate")
        run.table("samples.json", json.loads((paths.EVALUATE_REPORT / "samples.json").read_text(encoding="utf-8")))
    echo(
        f"{paths.EVALUATE_REPORT}: validation loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.1f}, "
        f"{metrics['bits_per_byte']:.3f} bits per byte "
        f"({metrics['bits_per_byte_low']:.3f} to {metrics['bits_per_byte_high']:.3f})"
    )


def evaluate(params: Params, stop: StopSignal) -> dict[str, float]:
    """Scores the model and generates samples. Writes reports/evaluate/; returns its metrics."""
    with stop.exit_immediately():
        from gpt2.device import choose_device, configure_device
        from gpt2.evaluation.cloze import cloze_questions
        from gpt2.model.storage import load_folder, masked_documents, trained_context_length

        harness_tasks = load_harness_tasks(params)
    device = choose_device(params.runtime.device)
    configure_device(device, params.runtime.threads)
    train_tokens, val_tokens = open_tokens(paths.TOKENS, "train"), open_tokens(paths.TOKENS, "val")
    questions = cloze_questions(val_tokens, params.evaluate.seed) if CLOZE in params.evaluate.tasks else []
    model = load_folder(paths.MODELS).to(device)
    model.mask_documents = masked_documents(paths.MODELS)
    context_length = trained_context_length(paths.MODELS) or model.config.block_size

    metrics = measure_loss(params, model, train_tokens, val_tokens, context_length, stop)
    metrics |= answer(params, model, questions, harness_tasks, context_length, stop)
    metrics |= generate(params, model, train_tokens, val_tokens, context_length, metrics["loss"], stop)
    write_json(paths.EVALUATE_REPORT / "metrics.json", metrics)
    return metrics


def load_harness_tasks(params: Params) -> dict[str, Any]:
    """The tasks of lm-evaluation-harness, with their data. Raises UserError like `gpt2.hub.harness.load_tasks`."""
    names = [name for name in params.evaluate.tasks if name != CLOZE]
    if not names:
        return {}
    from gpt2.hub.harness import load_tasks

    return load_tasks(names)


def measure_loss(
    params: Params, model: "GPT", train_tokens: Tokens, val_tokens: Tokens, context_length: int, stop: StopSignal
) -> dict[str, float]:
    """The scores on the held-out text, and where the loss comes from. Writes the tables and the pictures."""
    from gpt2 import tokenizer
    from gpt2.evaluation.breakdown import measure
    from gpt2.evaluation.scores import token_losses
    from stages import evaluation_report

    folder = paths.EVALUATE_REPORT
    with (
        _bar(len(val_tokens) - 1, "scoring") as scored,
        _bar(2 * len(train_tokens), "reading the training tokens") as read,
    ):
        scores, breakdown = measure(
            model,
            train_tokens,
            val_tokens,
            sequence_length=context_length,
            batch_size=params.evaluate.batch_size,
            seed=params.evaluate.seed,
            scored=stop.wrap(scored.update),
            read=stop.wrap(read.update),
        )
    evaluation_report.write_tables(breakdown, folder)
    segments = SegmentLosses.of(breakdown.segments, split_sha256(read_index(paths.TOKENS), "val"))
    write_text(paths.SEGMENT_LOSSES, segments.to_json())
    evaluation_report.draw_breakdown(breakdown, scores.bits_per_byte, folder / "breakdown.png")
    passage = middle(val_tokens, params.evaluate.passage_tokens)
    losses = token_losses(model, passage, sequence_length=context_length)
    texts = [tokenizer.decode([int(token)]) for token in passage]
    evaluation_report.draw_passage(texts, losses, folder / "passage.png")
    evaluation_report.write_passage(passage, losses, folder / "passage.json")
    names = ("bits_per_byte_low", "bits_per_byte_high", "ece", "contamination")
    return {**asdict(scores), **{name: getattr(breakdown, name) for name in names}}


def answer(
    params: Params,
    model: "GPT",
    questions: list[Any],
    harness_tasks: dict[str, Any],
    context_length: int,
    stop: StopSignal,
) -> dict[str, float]:
    """The results on the tasks, `task/<name>/<metric>`."""
    batch_size = params.evaluate.batch_size
    results: dict[str, float] = {}
    if questions:
        from gpt2.evaluation.choices import accuracy, score_endings

        with _bar(sum(len(question.endings) for question in questions), CLOZE, "ending") as progress:
            logprobs = score_endings(
                model,
                questions,
                context_length=context_length,
                batch_size=batch_size,
                progress=stop.wrap(progress.update),
            )
        results |= {f"task/{CLOZE}/{key}": value for key, value in asdict(accuracy(questions, logprobs)).items()}
    if harness_tasks:
        from gpt2.hub.harness import run_tasks

        with stop.exit_immediately():
            found = run_tasks(harness_tasks, model, context_length=context_length, batch_size=batch_size)
        results |= {f"task/{key}": value for key, value in found.items()}
    return results


def generate(
    params: Params,
    model: "GPT",
    train_tokens: Tokens,
    val_tokens: Tokens,
    context_length: int,
    loss: float,
    stop: StopSignal,
) -> dict[str, float]:
    """Writes the samples, and measures what they copy from the training text."""
    from gpt2.evaluation.memorization import longest_verbatim
    from gpt2.evaluation.samples import generate_samples, prompts_from
    from gpt2.inference.request import Sampling
    from stages import evaluation_report

    config = params.evaluate
    prompts = config.prompts or prompts_from(plain_text(val_tokens[:PROMPTS_FROM_TOKENS]))
    with _bar(len(prompts) * config.max_new_tokens, "generating samples") as progress:
        samples = generate_samples(
            model,
            prompts,
            Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p),
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            context_length=context_length,
            progress=stop.wrap(progress.update),
        )
    with _bar(len(train_tokens), "searching for verbatim copies") as progress:
        verbatim = longest_verbatim(samples, train_tokens, progress=stop.wrap(progress.update))
    pairs = [{"prompt": prompt, "sample": sample} for prompt, sample in zip(prompts, samples, strict=True)]
    write_json(paths.EVALUATE_REPORT / "samples.json", pairs)
    text = evaluation_report.describe_samples(config, prompts, samples, verbatim, loss)
    write_text(paths.EVALUATE_REPORT / "samples.md", text)
    return {"longest_verbatim_characters": len(verbatim)}


def plain_text(tokens: TokenArray) -> str:
    """The text of tokens, with documents on lines of their own."""
    from gpt2 import tokenizer

    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.END_OF_TEXT))
    return "\n".join(tokenizer.decode(part[part != tokenizer.END_OF_TEXT].tolist()) for part in documents)


def middle(tokens: Tokens, length: int) -> TokenArray:
    """`length` tokens, or all if there are fewer, from the middle of a text."""
    start = max(0, (len(tokens) - length) // 2)
    return tokens[start : start + length]


def _bar(total: int, description: str, unit: str = "token") -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=description, unit=unit, unit_scale=True, disable=None, leave=False)


if __name__ == "__main__":
    run_stage(main)
