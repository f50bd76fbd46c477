"""Training steps to be timed: ours and those of other implementations."""

import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from benchmarks import plain
from gpt2.config import GPT2_VOCAB_SIZE, GPTConfig, TrainConfig
from gpt2.data.token_files import count_tokens, open_tokens
from gpt2.model.transformer import GPT
from gpt2.optimizers.optimizer import Optimizer
from gpt2.training.mixed_precision import MixedPrecisionModel
from gpt2.training.vocabulary import TextVocabulary
from stages import paths


def text_batches(
    batch_size: int, length: int, number: int, device: torch.device
) -> tuple[list[plain.Batch], TextVocabulary]:
    """Batches of the tokens of the last pipeline run, and which of its tokens share a row."""
    import numpy as np

    tokens = open_tokens(paths.TOKENS, "train")
    counts = count_tokens(tokens)
    start, batches = 0, []
    for _ in range(number):
        part = torch.from_numpy(tokens[start : start + batch_size * length + 1].astype(np.int64)).to(device)
        batches.append((part[:-1].view(batch_size, length), part[1:].view(batch_size, length)))
        start += batch_size * length
    return batches, TextVocabulary(np.pad(counts, (0, GPT2_VOCAB_SIZE - len(counts))), min_count=2)


def make_step(
    contender: dict[str, Any],
    config: GPTConfig,
    precision: torch.dtype,
    device: torch.device,
    batches: list[plain.Batch],
    optimizer_seconds: list[float] | None = None,
    vocabulary: TextVocabulary | None = None,
) -> Callable[[], None]:
    """A contender's step. optimizer_seconds: ours appends what the optimizer took of it."""
    if contender.get("bound"):
        batch_size, length = batches[0][0].shape
        products = list(plain.products_alone(config, batch_size, length, precision, device))

        def all_products() -> None:
            for _ in batches:
                for product in products:
                    product()

        return all_products
    if "peer" not in contender:
        seconds = [] if optimizer_seconds is None else optimizer_seconds
        return our_step(contender, config, precision, device, batches, seconds, vocabulary)
    if contender["peer"] == "plain":
        model: Any = plain.PlainGPT(config).to(device)
        loss = torch.compile(model) if contender["compile"] else model
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = GPT2Config(
            n_positions=config.block_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
        model = GPT2LMHeadModel(sizes).to(device).train()  # type: ignore[arg-type]
        call = torch.compile(model) if contender["compile"] else model

        def loss(inputs: Any, targets: Any) -> Any:
            logits = call(input_ids=inputs).logits
            return torch.nn.functional.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.view(-1))

    return plain.plain_step(loss, model, batches, precision, device)


def our_step(
    contender: dict[str, Any],
    config: GPTConfig,
    precision: torch.dtype,
    device: torch.device,
    batches: list[plain.Batch],
    optimizer_seconds: list[float],
    vocabulary: TextVocabulary | None = None,
) -> Callable[[], None]:
    """The optimizer step of gpt2.training.trainer."""
    settings = dict.fromkeys((field.name for field in fields(TrainConfig)), 1) | {
        "freeze_layers": 0,
        "optimizer": contender.get("optimizer", "adamw"),
        "learning_rate": 1e-4,
        "muon_learning_rate": 1e-4,
        "min_learning_rate": 0.0,
        "warmup_steps": 0,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "dropout": 0.0,
        "label_smoothing": 0.0,
        "min_token_count": 0,
    }
    model = GPT(vocabulary.config(config) if vocabulary else config).to(device)
    optimizer = Optimizer(model, TrainConfig(**settings), dtype=precision)  # type: ignore[arg-type]
    checkpointing = contender.get("checkpointing", False)
    compute = MixedPrecisionModel(model, precision, gradient_checkpointing=checkpointing, vocabulary=vocabulary)
    if contender["compile"]:
        compute.compile(*batches[0][0].shape)

    def step() -> None:
        for inputs, targets in batches:
            (compute.loss(inputs, targets) / len(batches)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        start_s = time.perf_counter()
        optimizer.step()
        optimizer_seconds.append(time.perf_counter() - start_s)
        compute.cast_weights()
        optimizer.zero_grad()

    return step
