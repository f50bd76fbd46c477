"""`python -m gpt2 compare`: which setting is better, and is the difference more than luck?"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments import registry
from experiments.runs import Run, differing_params, experiments, find_run, flat_params
from experiments.settings import (
    METRICS,
    SEED,
    SPEED,
    TRAIN_KEYS,
    Metric,
    Setting,
    check_comparable,
    group,
    identity,
    with_same_text,
)
from experiments.statistics import LEVEL
from experiments.verdicts import BETTER, NOT_DISTINGUISHABLE, UNKNOWN, Verdict, judge_all
from gpt2.errors import UserError


@dataclass(frozen=True)
class Comparison:
    """A setting beside the baseline. verdicts: the loss first."""

    baseline: Setting
    other: Setting
    verdicts: list[Verdict]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = (
        "Compares settings, the first of which is the baseline. Runs that differ only in train.seed are one setting."
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a DVC experiment, branch, tag, commit, MLflow run's id, or workspace"
    )
    parser.add_argument(
        "--all-seeds", action="store_true", help="with all experiments that differ from the given runs only in the seed"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--set-champion",
        action="store_true",
        help="of two settings, give the model with the lower loss MLflow's alias champion, if that is more than luck",
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints the comparison. Raises UserError for runs that cannot be compared."""
    root = Path.cwd()
    named = [find_run(name, root) for name in arguments.runs]
    check_comparable(named)
    comparisons, settings = compare(named, experiments(root), all_seeds=arguments.all_seeds)
    if arguments.json:
        print(json.dumps(as_json(settings, comparisons), indent=2, allow_nan=False))
    else:
        print("\n".join(lines(settings, comparisons)))
    if arguments.set_champion:
        print(registry.crown(settings, comparisons[0].verdicts[0].models, root), file=sys.stderr)


def compare(
    named: Sequence[Run], known: Sequence[Run], *, all_seeds: bool = False
) -> tuple[list[Comparison], list[Setting]]:
    """The comparisons of the first setting with each other one, and all settings.

    known: further runs, whose spread of seeds counts where they have the same held-out text. all_seeds: those of the
    named settings count as if they were named. Raises UserError if there is only one setting.
    """
    same_text = [run for run in known if run.losses is not None and _text(run) == _text(named[0])]
    everything = group([*named, *same_text])
    keys = list(dict.fromkeys(map(identity, named)))
    settings = [everything[key] for key in keys] if all_seeds else list(group(named).values())
    if len(settings) == 1:
        names = ", ".join(run.name for run in named)
        raise UserError(
            f"{names}: one setting, there is nothing to compare it with; name a run that differs in more than {SEED}"
        )
    others = with_same_text((setting for key, setting in everything.items() if key not in keys), named[0])
    comparisons = []
    for key, other in zip(keys[1:], settings[1:], strict=True):
        verdicts = judge_all(
            settings[0],
            other,
            others=others,
            siblings=(everything[keys[0]], everything[key]),
            comparisons=len(settings) - 1,
        )
        comparisons.append(Comparison(settings[0], other, verdicts))
    return comparisons, settings


def _text(run: Run) -> tuple[str, int]:
    assert run.losses is not None
    return run.losses.sha256, run.losses.tokens


def lines(settings: Sequence[Setting], comparisons: Sequence[Comparison]) -> list[str]:
    """The table of the settings, and what each comparison says."""
    shown = [*_table(settings), ""]
    for each in comparisons:
        shown += [*_comparison(each, LEVEL / len(comparisons)), ""]
    return [*shown, *_notes(settings, comparisons)]


def _table(settings: Sequence[Setting]) -> list[str]:
    names = [name for name in differing_params([each.runs[0] for each in settings]) if name != SEED]
    rows = [["", "n", *(metric.name for metric in METRICS), *names]]
    for setting in settings:
        params = flat_params(setting.runs[0])
        cells = [shown_values(metric, setting.values(metric)) for metric in METRICS]
        rows.append([setting.name, str(len(setting.runs)), *cells, *(_short(params.get(name)) for name in names)])
    return aligned(rows)


def shown_values(metric: Metric, values: Sequence[float]) -> str:
    """Mean and standard deviation over the runs of a setting."""
    if not values:
        return "-"
    scale, digits, unit = (1e6, 0, " MB") if metric.name == "peak memory" else (1, 0, "")
    if metric.unit:
        digits = metric.digits
    text = f"{np.mean(values) / scale:,.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1) / scale:,.{digits}f}{unit}" if len(values) > 1 else f"{text}{unit}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{'>' if index else '<'}{width}}"
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _comparison(comparison: Comparison, level: float) -> list[str]:
    percent = f"{100 * (1 - level):.4g} %"
    rows = [["", "verdict", "change", f"{percent} interval", "these models, on texts like this"]]
    rows += [[f"  {verdict.metric.name}", verdict.word, *changes(verdict)] for verdict in comparison.verdicts]
    return [sentence(comparison), *aligned(rows)]


def sentence(comparison: Comparison) -> str:
    """The verdict on the loss in words."""
    verdict, a, b = comparison.verdicts[0], comparison.baseline.name, comparison.other.name
    amount = f"{abs(verdict.change.value):.4f} nats per token"
    side = "lower" if verdict.change.value < 0 else "higher"
    if verdict.word == UNKNOWN:
        return (
            f"{b} against {a}: {UNKNOWN}, its loss is {amount} {side}. No setting on this text has two seeds, so "
            f"what a seed changes is unknown; train each with two more: dvc exp run --queue -S '{SEED}=1,2'"
        )
    if verdict.word == NOT_DISTINGUISHABLE:
        return f"{b} is {NOT_DISTINGUISHABLE} from {a} by its loss, {more_seeds(verdict)}."
    return f"{b} is {verdict.word} than {a}: its loss is {amount} {side}."


def more_seeds(verdict: Verdict) -> str:
    """How many more seeds would tell, in words."""
    count = verdict.change.more_seeds
    if count is None:
        return "and 100 more seeds of each would not tell, if the difference is what it is now"
    return f"about {count} more seed{'s' if count > 1 else ''} of each would tell"


def changes(verdict: Verdict) -> list[str]:
    """The change, its interval, and the interval for these models; "-" for what is not known."""
    metric, change = verdict.metric, verdict.change

    def shown(value: float) -> str:
        return f"{value:+.{metric.digits}f}" if metric.unit else f"{100 * math.expm1(value):+.1f} %"

    def interval(low: float | None, high: float | None) -> str:
        return "-" if low is None or high is None else f"{shown(low)} to {shown(high)}"

    return [shown(change.value), interval(change.low, change.high), interval(*(verdict.models or (None, None)))]


def _notes(settings: Sequence[Setting], comparisons: Sequence[Comparison]) -> list[str]:
    losses = settings[0].runs[0].losses
    assert losses is not None
    notes = [
        f"Losses are of the same {losses.tokens:,} held-out tokens in {len(losses.losses)} segments; intervals are "
        "over seeds and over texts like this."
    ]
    for each in comparisons:
        verdict = each.verdicts[0]
        spread = verdict.spread
        if verdict.pairs:
            note = (
                f"{each.other.name} and {each.baseline.name} share {verdict.pairs} seeds: compared in pairs, whose "
                f"difference varies by {math.sqrt(spread.variance):.4f} (standard deviation)."
            )
        elif spread.df:
            note = (
                f"Seeds change the loss by {math.sqrt(spread.variance):.4f} (standard deviation), from {spread.runs} "
                f"runs in {spread.groups} setting{'s' if spread.groups > 1 else ''}."
            )
        else:
            continue
        if note not in notes:
            notes.append(note)
    runtimes = [setting.runs[0].params.get("runtime", {}) for setting in settings]
    differing = sorted({key for one in runtimes for key in one if any(each.get(key) != one[key] for each in runtimes)})
    if differing and all(setting.values(SPEED) for setting in settings):
        notes.append(f"Speed and memory: the runs also differ in runtime.{', runtime.'.join(differing)}.")
    return notes


def as_json(settings: Sequence[Setting], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """All numbers, for other programs. Changes of speed and memory are ratios less one."""

    def changed(verdict: Verdict, value: float | None) -> float | None:
        return value if value is None or verdict.metric.unit else math.expm1(value)

    def verdict_json(verdict: Verdict) -> dict[str, Any]:
        change = verdict.change
        return {
            "verdict": verdict.word,
            "unit": verdict.metric.unit or "ratio",
            **{key: changed(verdict, getattr(change, key)) for key in ("value", "low", "high")},
            "more_seeds": change.more_seeds,
            "pairs": verdict.pairs,
            "models_low": verdict.models[0] if verdict.models else None,
            "models_high": verdict.models[1] if verdict.models else None,
            "spread": {**asdict(verdict.spread), "of_logarithms": verdict.metric in TRAIN_KEYS},
        }

    return {
        "settings": [
            {
                "name": setting.name,
                "runs": [{"name": run.name, "commit": run.commit} for run in setting.runs],
                "values": {metric.name: setting.values(metric) for metric in METRICS},
            }
            for setting in settings
        ],
        "differing_params": [name for name in differing_params([each.runs[0] for each in settings]) if name != SEED],
        "level": LEVEL / len(comparisons),
        "comparisons": [
            {
                "baseline": each.baseline.name,
                "other": each.other.name,
                "is_better": each.verdicts[0].word == BETTER,
                "verdicts": {verdict.metric.name: verdict_json(verdict) for verdict in each.verdicts},
            }
            for each in comparisons
        ],
    }


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."
