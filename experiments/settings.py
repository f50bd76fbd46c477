"""Settings of a training: the runs that differ only in their seed, and what is measured of them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.runs import Run
from experiments.statistics import Values
from gpt2.errors import UserError
from stages import paths

SECTIONS = ("corpus", "tokenize", "model", "train")
"""Of params.yaml: those that the weights depend on."""
SEED = "train.seed"


@dataclass(frozen=True)
class Metric:
    """What is compared. digits: shown. unit: None compares ratios: a factor means the same for any size of model.

    negligible: difference that matters to nobody, as a part of the value.
    """

    name: str
    lower_is_better: bool
    digits: int = 4
    unit: str | None = None
    negligible: float = 0.0


LOSS = Metric("loss", True, unit="nats per token")
BITS = Metric("bits per byte", True, unit="bits per byte")
SPEED = Metric("tokens/s", False, negligible=0.01)
MEMORY = Metric("peak memory", True, negligible=0.01)
METRICS = (LOSS, BITS, SPEED, MEMORY)
TRAIN_KEYS = {SPEED: "tokens_per_s", MEMORY: "peak_memory_bytes"}


@dataclass(frozen=True)
class Setting:
    """Runs that differ only in their seed, one for each seed."""

    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """The names of the runs."""
        first, *others = (run.name for run in self.runs)
        return (
            first if not others else f"{first} and {len(others)} more" if len(others) > 1 else f"{first}, {others[0]}"
        )

    @property
    def seeds(self) -> list[Any]:
        """The seed of each run."""
        return [seed_of(run) for run in self.runs]

    def only(self, seeds: Sequence[Any]) -> "Setting":
        """The runs with these seeds, in their order."""
        by_seed = dict(zip(self.seeds, self.runs, strict=True))
        return Setting(tuple(by_seed[seed] for seed in seeds))

    def values(self, metric: Metric) -> list[float]:
        """The value of each run; none if one of them lacks it."""
        if metric in TRAIN_KEYS:
            found = [run.train_metrics.get(TRAIN_KEYS[metric]) or 0.0 for run in self.runs]
            return found if all(value > 0 for value in found) else []
        weights = self.weights(metric)
        return [float(row @ weights / weights.sum()) for row in self.segments(metric)]

    def segments(self, metric: Metric) -> Values:
        """The loss or the bits per byte of each segment: (runs, segments)."""
        losses = [run.losses for run in self.runs if run.losses is not None]
        return np.array([each.losses if metric is LOSS else each.bits_per_byte for each in losses])

    def weights(self, metric: Metric) -> Values:
        """What each segment counts in the mean, its tokens or its bytes: (segments,)."""
        losses = self.runs[0].losses
        assert losses is not None
        return losses.lengths if metric is LOSS else losses.byte_counts


def identity(run: Run) -> str:
    """What makes the setting of a run: its params but the seed, the code and the tokens that it was trained with."""
    params = {section: dict(run.params.get(section, {})) for section in SECTIONS}
    params["train"].pop("seed", None)
    return json.dumps([params, _training_inputs(run)], sort_keys=True, default=str)


def _training_inputs(run: Run) -> str:
    """The checksums of code and tokens in dvc.lock; without it, the commit.

    Cut out of the text, because reading YAML takes longer than all else. DVC writes deps, params and outs in this
    order.
    """
    lock = (run.files.read("dvc.lock") or b"").decode(errors="replace")
    _, found, rest = lock.partition("\n  train:\n")
    deps, complete, _ = rest.partition("\n    params:\n")
    return deps if found and complete else str(run.commit)


def seed_of(run: Run) -> Any:
    """The seed of a run; None if its params do not say."""
    return run.params.get("train", {}).get("seed")


def group(runs: Iterable[Run]) -> dict[str, Setting]:
    """The settings of runs, by their identity, in the order of their first runs. Of runs with one seed, the first."""
    settings: dict[str, dict[Any, Run]] = {}
    for run in runs:
        settings.setdefault(identity(run), {}).setdefault(seed_of(run), run)
    return {key: Setting(tuple(by_seed.values())) for key, by_seed in settings.items()}


def held_out(run: Run) -> tuple[str, int]:
    """The SHA-256 and the number of the held-out tokens. Raises UserError if a run has no segment losses."""
    if run.losses is None:
        again = f"`dvc exp apply {run.name}`, then `dvc repro evaluate`" if run.commit else "`dvc repro evaluate`"
        raise UserError(
            f"{run.name} has no readable {paths.SEGMENT_LOSSES}: it was not evaluated, or by an earlier version; "
            f"{again}"
        )
    return run.losses.sha256, run.losses.tokens


def check_comparable(runs: Sequence[Run]) -> None:
    """Raises UserError unless all runs were evaluated on the same held-out text."""
    first = held_out(runs[0])
    for run in runs[1:]:
        if held_out(run) != first:
            raise UserError(
                f"{runs[0].name} and {run.name} have different held-out texts ({first[1]:,} tokens with "
                f"SHA-256 {first[0][:8]}, {held_out(run)[1]:,} with {held_out(run)[0][:8]}); losses on different texts "
                "cannot be compared"
            )


def with_same_text(settings: Iterable[Setting], run: Run) -> list[Setting]:
    """The settings with several runs that all have the held-out text of a run."""
    text = held_out(run)
    kept = []
    for setting in settings:
        if len(setting.runs) > 1:
            runs = tuple(each for each in setting.runs if each.losses is not None and held_out(each) == text)
            if len(runs) > 1:
                kept.append(Setting(runs))
    return kept
