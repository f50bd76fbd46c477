"""How often `compare` says "better" of runs that differ only in their seed, and how often it finds a true difference.

    python -m benchmarks.compare                  trains 480 runs of a tiny model, then compares them

A run is a model with 22,000 parameters on the bytes of the last pipeline run's text (`dvc repro tokenize`), a second
of one core. What is trained stays in data/compare-runs.npz, so that the program can be stopped and started again.
Groups of these runs are drawn at random, and judged by the code of `python -m gpt2 compare`. Writes
reports/benchmarks/compare.{json,md}.
"""

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

REPORT = Path("reports/benchmarks")
RUNS = Path("data/compare-runs.npz")
SEGMENTS, SEGMENT_BYTES, STEPS = 288, 128, 110
LEARNING_RATES = {"base": 1.0e-2, "near": 7.7e-3}
CASES = (
    (1, 1, False),
    (1, 2, False),
    (1, 5, False),
    (2, 0, False),
    (2, 2, False),
    (3, 0, False),
    (3, 2, False),
    (5, 0, False),
    (3, 0, True),
    (5, 0, True),
)
"""Seeds of each setting, number of further settings with three seeds each, and whether the two share their seeds."""
Losses = npt.NDArray[np.float64]


def main() -> None:
    """Trains what is missing, then draws groups and counts verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400, help="of the base setting (default: %(default)s)")
    parser.add_argument("--others", type=int, default=80, help="of the other setting (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=2000, help="of groups (default: %(default)s)")
    arguments = parser.parse_args()
    losses = train_all(arguments.runs, arguments.others, RUNS)
    report(losses, arguments.draws)


def train_all(runs: int, others: int, path: Path) -> dict[str, Losses]:
    """The losses of each setting, (runs, segments). Goes on where an earlier call was stopped."""
    losses: dict[str, list[Any]] = {name: [] for name in LEARNING_RATES}
    if path.is_file():
        with np.load(path, allow_pickle=False) as saved:
            losses |= {name: list(saved[name]) for name in losses}
    wanted = {name: runs if name == "base" else others for name in losses}
    training, held_out = text()
    path.parent.mkdir(exist_ok=True)
    while behind := [name for name in wanted if len(losses[name]) < wanted[name]]:
        name = min(behind, key=lambda each: len(losses[each]) / wanted[each])  # the settings side by side
        losses[name].append(train(training, held_out, LEARNING_RATES[name], seed=len(losses[name])))
        temporary = path.with_suffix(".new.npz")
        arrays: Any = {name: np.array(rows).reshape(-1, SEGMENTS) for name, rows in losses.items()}
        np.savez(temporary, **arrays)
        temporary.replace(path)
        print(", ".join(f"{name}: {len(rows)} runs" for name, rows in losses.items()), flush=True)
    return {name: np.array(rows) for name, rows in losses.items()}


def text() -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    """The training and held-out bytes of the last pipeline run, each as the GPT-2 token of that byte."""
    from gpt2 import tokenizer
    from gpt2.data.token_files import open_tokens
    from stages import paths

    token_of = np.zeros(256, dtype=np.uint16)
    for token in range(256):
        token_of[tokenizer.token_bytes(token)[0]] = token

    def read(split: str) -> npt.NDArray[np.uint16]:
        tokens = open_tokens(paths.TOKENS, split)[:]
        return token_of[np.frombuffer(tokenizer.decode(tokens.tolist()).encode(), dtype=np.uint8)]

    return read("train"), read("val")[: SEGMENTS * SEGMENT_BYTES + 1]


def train(
    training: npt.NDArray[np.uint16], held_out: npt.NDArray[np.uint16], learning_rate: float, seed: int
) -> Losses:
    """The loss of each segment of the held-out bytes after a run: (segments,)."""
    import torch

    from benchmarks.learning import SilentCallbacks
    from gpt2.config import GPTConfig
    from gpt2.data.sampler import Sampler
    from gpt2.evaluation.bootstrap import SegmentSums
    from gpt2.evaluation.scores import score
    from gpt2.model.transformer import GPT
    from gpt2.optimizers.optimizer import Optimizer
    from gpt2.training.mixed_precision import MixedPrecisionModel
    from gpt2.training.state import TrainState
    from gpt2.training.trainer import Trainer
    from stages.params import load_params

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = replace(
        load_params(Path("params.yaml")).train,
        seed=seed,
        batch_size=16,
        sequence_length=32,
        max_steps=STEPS,
        warmup_steps=min(10, STEPS - 1),
        eval_interval=STEPS,
        learning_rate=learning_rate,
    )
    model = GPT(GPTConfig(block_size=32, vocab_size=256, n_layer=1, n_head=2, n_embd=32))
    Trainer(
        MixedPrecisionModel(model, torch.float32),
        Optimizer(model, config),
        Sampler(training, config),
        lambda *_: 0.0,
        config,
        TrainState.initial(torch.float32, config.batch_size),
        SilentCallbacks(),
        log_interval=10**9,
    ).train()
    sums = SegmentSums(len(held_out) - 1)
    score(model, held_out, sequence_length=config.sequence_length, batch_size=64, observe=sums.add)
    return sums.nats / SEGMENT_BYTES


def draws(losses: dict[str, Losses], other: str, seeds: int, known: int, shared: bool, count: int) -> Iterator[str]:
    """The word for the loss of groups drawn at random: `seeds` runs of the setting `other` against as many of "base".

    known: further settings with three seeds each, which say how seeds vary. shared: whether the groups share seeds, as
    the runs of both settings with one number do; of one setting, runs are paired that only pretend to.
    """
    from experiments.settings import LOSS
    from experiments.verdicts import judge

    generator = np.random.default_rng([seeds, known, shared, other == "base"])
    for _ in range(count):
        order = generator.permutation(len(losses["base"]))
        if other != "base":
            order = order[order < len(losses[other])]
        first, second, rest = order[:seeds], order[seeds : 2 * seeds], order[2 * seeds :]
        if shared and other != "base":
            second = first
        others = [setting(losses["base"][rest[start : start + 3]]) for start in range(0, 3 * known, 3)]
        groups = (setting(losses["base"][first]), setting(losses[other][second], range(0 if shared else 1000, 2000)))
        verdict = judge(*groups, LOSS, others=others)
        yield verdict.word if verdict else ""


def setting(losses: Losses, seeds: Iterable[int] = range(1000)) -> Any:
    """Runs with these losses, (runs, segments), and these seeds, as `compare` reads them."""
    from experiments.files import WorkspaceFiles
    from experiments.runs import Run
    from experiments.settings import Setting
    from stages.segment_losses import SegmentLosses

    byte_counts = np.full(losses.shape[1], float(SEGMENT_BYTES))
    runs = []
    for row, seed in zip(losses, seeds, strict=False):
        run = Run("drawn", None, WorkspaceFiles(Path("nowhere")))
        found = SegmentLosses("text", SEGMENTS * SEGMENT_BYTES, SEGMENT_BYTES, row, row / np.log(2), byte_counts)
        vars(run).update(losses=found, params={"train": {"seed": seed}})  # cached properties
        runs.append(run)
    return Setting(tuple(runs))


def report(losses: dict[str, Losses], count: int) -> None:
    """Counts the verdicts, and writes reports/benchmarks/compare.{json,md}."""
    from experiments.verdicts import BETTER, WORSE

    means = {name: rows.mean(axis=1) for name, rows in losses.items()}
    pairs = means["near"] - means["base"][: len(means["near"])]  # with one seed
    rows = []
    for seeds, known, shared in CASES:
        row: dict[str, float] = {"seeds": seeds, "known_settings": known, "shared": shared}
        for kind, other in (("false", "base"), ("found", "near")):
            words = list(draws(losses, other, seeds, known, shared, count))
            row[f"{kind}_better"] = words.count(BETTER) / count
            row[f"{kind}_worse"] = words.count(WORSE) / count
        rows.append(row)
        print(row, flush=True)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "runs": {name: len(values) for name, values in means.items()},
        "spread_of_seeds": {name: float(values.std(ddof=1)) for name, values in means.items()},
        "true_difference": float(pairs.mean()),
        "true_difference_error": float(pairs.std(ddof=1) / len(pairs) ** 0.5),
        "spread_of_pairs": float(pairs.std(ddof=1)),
        "draws": count,
        "disjoint_pairs": disjoint_pairs(losses["base"]),
        "rows": rows,
    }
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / "compare.json").write_text(json.dumps(result, indent=2) + "\n")
    (REPORT / "compare.md").write_text("\n".join(table(result)) + "\n")


def disjoint_pairs(base: Losses) -> dict[str, int]:
    """Verdicts on pairs of single runs that share no run, with the spread of six other runs in two settings."""
    from experiments.settings import LOSS
    from experiments.verdicts import BETTER, WORSE, judge

    generator = np.random.default_rng(0)
    words = []
    for first in range(0, len(base) - 1, 2):
        rest = generator.permutation(np.delete(np.arange(len(base)), [first, first + 1]))
        others = [setting(base[rest[start : start + 3]]) for start in (0, 3)]
        verdict = judge(setting(base[[first]]), setting(base[[first + 1]]), LOSS, others=others)
        words.append(verdict.word if verdict else "")
    return {"pairs": len(words), "better_or_worse": words.count(BETTER) + words.count(WORSE)}


def table(result: dict[str, Any]) -> list[str]:
    """The report as Markdown."""
    pairs, spread = result["disjoint_pairs"], result["spread_of_seeds"]["base"]
    lines = [
        "# Luck or better?",
        "",
        f"Made by `python -m benchmarks.compare` ({result['date']}) from {result['runs']['base']} runs of a tiny model "
        f"that differ only in their seed, and {result['runs']['near']} with another learning rate. Seeds change the "
        f"loss by {spread:.4f} (standard deviation). The true difference of the two settings is "
        f"{result['true_difference']:.4f} ± {result['true_difference_error']:.4f} nats, "
        f"{result['true_difference'] / spread:.1f} times that. Between runs of both that share a seed, it varies by "
        f"{result['spread_of_pairs']:.4f}.",
        "",
        f"Of {pairs['pairs']} pairs of runs that share no run, and differ only in their seed, `compare` called "
        f"{pairs['better_or_worse']} ({pairs['better_or_worse'] / pairs['pairs']:.1%}) better or worse.",
        "",
        f"Each line is {result['draws']} draws of runs. Shared: both settings have the same seeds. Known: "
        "further settings with three seeds each, which say how much seeds vary.",
        "",
        "| seeds of each | shared | known | no difference: called one | a true one: found | called the other way |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        wrong = row["false_better"] + row["false_worse"]
        lines.append(
            f"| {row['seeds']} | {'yes' if row['shared'] else 'no'} | {row['known_settings']} | {wrong:.1%} "
            f"| {row['found_worse']:.1%} | {row['found_better']:.1%} |"
        )
    return lines


if __name__ == "__main__":
    main()
