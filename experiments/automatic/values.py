"""The params of a plan, each with a comment that says why."""

import textwrap
from typing import Any

from experiments.automatic.plan import MAX_VALIDATION_FRACTION, Plan
from experiments.automatic.recipe import OPTIMIZER, UNCERTAINTY, WARM_UP, Recipe, rates, weight_decay
from experiments.automatic.text import READ_BYTES, Text
from gpt2.config import GPT2_VOCAB_SIZE

Values = dict[tuple[str, str], tuple[Any, str]]
SHARED_ROW = 0.5
"""Texts with less than this share of the vocabulary share a row of the embedding among the tokens they lack."""


def training_values(chosen: Recipe, text: Text) -> Values:
    """What the time of a step depends on. Params that a version does not have are left out when they are written."""
    model, share = chosen.model, text.distinct / GPT2_VOCAB_SIZE
    return {
        ("model", "block_size"): (
            model.block_size,
            "context, in tokens; longer ones pay in runs of millions of tokens",
        ),
        ("model", "vocab_size"): (GPT2_VOCAB_SIZE, ""),
        ("model", "n_layer"): (model.n_layer, "the size with the lowest expected loss in the time, of those measured"),
        ("model", "n_head"): (model.n_head, "64 of the width for each"),
        ("model", "n_embd"): (model.n_embd, "a multiple of n_head"),
        ("train", "init_from"): ("scratch", ""),
        ("train", "freeze_layers"): (0, ""),
        ("train", "batch_size"): (chosen.batch_size, "sequences in a micro-batch"),
        ("train", "sequence_length"): (model.block_size, "tokens in a sequence, up to block_size"),
        ("train", "gradient_accumulation_steps"): (
            chosen.gradient_accumulation_steps,
            f"micro-batches in a step, of {chosen.step_tokens:,} tokens: more in longer runs",
        ),
        **{("train", key): (value, "") for key, value in OPTIMIZER.items()},
        ("train", "dropout"): (0.0, "weight decay did better in runs that read a text many times"),
        ("train", "min_token_count"): (
            2 if share < SHARED_ROW else 0,
            f"the text has {share:.0%} of the {GPT2_VOCAB_SIZE:,} tokens",
        ),
    }


def run_values(plan: Plan, text: Text) -> Values:
    """The length of the run, and how its results are measured."""
    held_out = f"held out: {round(plan.validation_fraction * text.tokens):,} tokens"
    if plan.validation_fraction < MAX_VALIDATION_FRACTION:
        held_out += ", as many as there is time to score"
    length = (
        "fewer than fit the time, as more epochs do not lower the loss," if plan.is_early else "as many as fit the time"
    )
    values: Values = {
        ("tokenize", "validation_fraction"): (plan.validation_fraction, held_out),
        ("train", "max_steps"): (
            plan.steps,
            f"{length} at {plan.tokens_per_s:,.0f} tokens/s; reads the text {plan.epochs:.2g} times",
        ),
        **{
            ("train", key): (rate, "lower for a text that is read many times")
            for key, rate in rates(plan.epochs).items()
        },
        ("train", "weight_decay"): (weight_decay(plan.epochs), "more for a text that is read many times"),
        ("train", "warmup_steps"): (max(1, round(WARM_UP * plan.steps)), f"{WARM_UP:.0%} of the steps"),
        ("train", "eval_interval"): (plan.eval_interval, "steps; the best weights are kept"),
        ("train", "patience"): (None, "the run takes the time that it was planned for"),
        ("runtime", "log_interval"): (max(1, plan.steps // 50), "steps between points of the curves"),
    }
    if text.is_cut:
        values["corpus", "limit"] = (f"{READ_BYTES // 10**6} MB", "of a larger text, more than is read in the time")
    return values


def describe_text(text: Text) -> str:
    """A text in a line."""
    more = "the first " if text.is_cut else ""
    return (
        f"the text: {more}{text.bytes:,} bytes, {text.tokens:,} tokens, {text.distinct:,} of them different; "
        f"{text.repeated:.1%} of its runs of 13 tokens and {text.repeated_lines:.1%} of its longer lines repeat others"
    )


def describe_loss(plan: Plan, text: Text) -> str:
    """The expected loss, and how far to trust it."""
    low, high = plan.loss * (1 - UNCERTAINTY), plan.loss * (1 + UNCERTAINTY)
    return (
        f"expected validation loss {plan.loss:.2f} ({low:.2f} to {high:.2f}), from the size, the tokens of training "
        f"and {text.counting_loss:.2f} for predictions by counting tokens and pairs of them"
    )


def header(plan: Plan, text: Text, minutes: float, device: str) -> list[str]:
    """The comment above a params file."""
    return [
        f"Made by `make preset NAME=auto MINUTES={minutes:g}` for {device}.",
        *wrapped(describe_text(text)),
        *wrapped(describe_loss(plan, text)),
        f"`dvc repro` is planned to take {plan.seconds / 60:.1f} minutes, with nothing else running.",
    ]


def wrapped(line: str) -> list[str]:
    """Lines of a comment."""
    return textwrap.wrap(line[0].upper() + line[1:] + ".", 115)
