"""What the report says of each run, in the order of the leaderboard."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from experiments.files import GitFiles, MlflowFiles
from experiments.report.numbers import is_number, plain
from experiments.runs import WORKSPACE, Run, differing_params, experiments, flat_params

PASSAGE = "reports/evaluate/passage.json"
MAX_PASSAGE_TOKENS = 1000
NO_EVALUATION = ""


@dataclass(frozen=True)
class Facts:
    """A run with its place in the report.

    text: which held-out text it was evaluated on; runs with the same one can be compared. NO_EVALUATION if on none.
    """

    number: int
    run: Run
    text: str
    is_experiment: bool

    @property
    def name(self) -> str:
        """The name, without invisible characters."""
        return plain(self.run.name)

    @property
    def evaluated(self) -> dict[str, float]:
        """The metrics of `evaluate` that are finite numbers."""
        return {key: value for key, value in self.run.evaluate_metrics.items() if is_number(value)}

    @property
    def trained(self) -> dict[str, float]:
        """The metrics of `train` that are finite numbers."""
        return {key: value for key, value in self.run.train_metrics.items() if is_number(value)}

    @property
    def state(self) -> str:
        """What is missing; empty for a complete run."""
        if not self.trained and not self.evaluated:
            return "no results"
        return "" if self.evaluated else "not evaluated"

    @property
    def commands(self) -> list[tuple[str, str]]:
        """How to get the run back: what a command does, and the command."""
        name = shlex.quote(self.run.name)
        if self.run.name == WORKSPACE and self.run.commit is None:
            return [("keep it as an experiment", "dvc exp save --name NAME")]
        found = [("take over its params and results", f"dvc exp apply {name}")] if self.is_experiment else []
        if isinstance(self.run.files, MlflowFiles):
            name = self.run.files.run_id
        return [*found, ("train it again and compare", f"python -m gpt2 reproduce {name}")]

    @property
    def provenance(self) -> list[tuple[str, str]]:
        """The commit, and what was recorded of the environment, by dotted names."""
        rows = [("commit", self.run.commit)] if self.run.commit else []
        if isinstance(self.run.files, MlflowFiles):
            rows.append(("MLflow run", self.run.files.run_id))
        return [*rows, *((key, value) for key, value in _flat(self.run.environment) if value != self.run.commit)]

    @cached_property
    def passage(self) -> tuple[list[str], list[float | None]] | None:
        """The texts and losses of the tokens of the passage; None without one.

        A token without text of its own, a part of a character, is counted with the one that completes it.
        """
        content = self.run.files.read(PASSAGE)
        try:
            return None if content is None else _passage(json.loads(content))
        except (ValueError, TypeError, KeyError):
            return None


def collect(runs: Sequence[Run]) -> list[Facts]:
    """The facts of runs, best bits per byte first: the largest group with the same held-out text, then the others."""
    texts = held_out_texts(runs)
    sizes = Counter(texts)
    first = {text: index for index, text in reversed(list(enumerate(texts)))}

    def place(index: int) -> tuple[Any, ...]:
        text = texts[index]
        score = runs[index].evaluate_metrics.get("bits_per_byte")
        known = score if score is not None and is_number(score) else float("inf")
        return text == NO_EVALUATION, -sizes[text], first[text], known, not runs[index].train_metrics, index

    roots = {run.files.root for run in runs if isinstance(run.files, GitFiles)}
    commits = {run.commit for root in roots for run in experiments(root)}
    order = sorted(range(len(runs)), key=place)
    return [
        Facts(
            number, runs[index], texts[index], isinstance(runs[index].files, GitFiles) and runs[index].commit in commits
        )
        for number, index in enumerate(order)
    ]


def held_out_texts(runs: Sequence[Run]) -> list[str]:
    """A name for the held-out text of each run: equal names, equal texts.

    It is the SHA-256 of the held-out tokens. A run without it gets that of a run with the same corpus, split and sizes,
    or these themselves.
    """
    sizes = [_sizes(run) for run in runs]
    sums = {size: run.losses.sha256 for size, run in zip(sizes, runs, strict=True) if size and run.losses is not None}
    return [
        run.losses.sha256 if run.losses is not None and size else sums.get(size, size)
        for size, run in zip(sizes, runs, strict=True)
    ]


def _sizes(run: Run) -> str:
    metrics = run.evaluate_metrics
    if not is_number(metrics.get("loss")):
        return NO_EVALUATION
    data = [run.params.get(section) for section in ("corpus", "tokenize")]
    return json.dumps([metrics.get("tokens"), metrics.get("bytes"), data], default=str)


def params_table(facts: Sequence[Facts]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """The params that differ: name, and for each run its value and whether it is not the most common one."""
    known = [each for each in facts if each.run.params]
    flat = {each.number: flat_params(each.run) for each in known}
    table = []
    for name in differing_params([each.run for each in known]) if len(known) > 1 else []:
        values = {number: _shown(params.get(name)) for number, params in flat.items()}
        (common, count), *_ = Counter(values.values()).most_common(1)
        cells = [values.get(each.number, "") for each in facts]
        table.append((name, [(cell, bool(cell) and count > 1 and cell != common) for cell in cells]))
    return table


def changed_params(table: Sequence[tuple[str, list[tuple[str, bool]]]], each: Facts) -> list[str]:
    """The params of a run that are not the most common ones, without their sections: "learning_rate 0.006"."""
    cells = [(name.split(".", 1)[-1], *row[each.number]) for name, row in table]
    return [f"{name} {value}" for name, value, is_other in cells if is_other]


def samples_by_prompt(facts: Sequence[Facts]) -> list[tuple[str, list[tuple[Facts, str]]]]:
    """Each prompt, in order, with the runs that continued it."""
    found: dict[str, list[tuple[Facts, str]]] = {}
    for each in facts:
        for row in each.run.samples:
            if "prompt" in row and "sample" in row:
                found.setdefault(row["prompt"], []).append((each, row["sample"]))
    return list(found.items())


def _passage(content: Any) -> tuple[list[str], list[float | None]] | None:
    texts: list[str] = []
    losses: list[float | None] = []
    waiting = 0.0
    for text, loss in zip(content["tokens"], content["losses"], strict=True):
        if not isinstance(text, str) or not (loss is None or is_number(loss)):
            raise ValueError("a token without text or loss")
        waiting += loss or 0.0
        if text:
            texts.append(text)
            losses.append(None if loss is None and not waiting else round(waiting, 3))
            waiting = 0.0
    return (texts[:MAX_PASSAGE_TOKENS], losses[:MAX_PASSAGE_TOKENS]) if texts else None


def _flat(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((f"{prefix}{key}", _shown(value)))
    return rows


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
