"""What changes of the optimizer are worth: short runs of the preset laptop, one change at a time, on the same seeds.

    python -m benchmarks.ablations               three seeds of each, over an hour on two cores
    python -m benchmarks.ablations --only cautious

Each run has 120 steps, 24 % of those in which the baseline recipe reaches its best loss (benchmarks/learning.py), no
dropout, weight decay 0.1, and momentum 0.95: each change is made to that, alone. Runs that are in the report already
are not repeated. One that lowers the loss is the default (momentum 0.9); the others exist only here. Writes
reports/benchmarks/ablations.{json,md}.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student_t
from torch import Tensor, nn

from benchmarks.learning import REPORT, run
from gpt2.optimizers.muon import COEFFICIENTS, Muon, orthogonalize

STEPS, WARM_UP = 120, 10
FIRST_MOMENTUM, MOMENTUM = 0.85, 0.95
BASE = "momentum 0.95"
"""What each change is made to."""
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
)
"""Coefficients of each iteration: Amsel et al., 2025, https://arxiv.org/abs/2505.16932, algorithm 2, without its margin
for rounding, a factor of 1.01."""


@dataclass(frozen=True)
class Change:
    """A change to the base. train: its values. muon: options of `StudiedMuon`. source: who proposed it.

    averaged_steps: last steps whose weights are averaged.
    """

    train: dict[str, Any] = field(default_factory=dict)
    muon: dict[str, Any] = field(default_factory=dict)
    averaged_steps: int = 0
    source: str = ""


CHANGES = {
    BASE: Change(),
    "learning rate 6e-3": Change({"learning_rate": 6e-3}),
    "learning rate 2.4e-2": Change({"learning_rate": 2.4e-2}),
    "beta2 0.95": Change({"beta2": 0.95}),
    "beta1 0.85": Change({"beta1": 0.85}),
    "warm-up of 2 steps": Change({"warmup_steps": 2}),
    "warm-up of 2 steps and learning rate 6e-3": Change({"warmup_steps": 2, "learning_rate": 6e-3}),
    "min_token_count 1": Change({"min_token_count": 1}),
    "min_token_count 0": Change({"min_token_count": 0}),
    "momentum 0.9, the default": Change(muon={"momentum": 0.9}),
    "momentum 0.85 to 0.95 in 40 steps": Change(muon={"warm_up_steps": 40}),
    "mean of the weights of the last 12 steps": Change(averaged_steps=12),
    "NorMuon": Change(muon={"normalized": True}, source="https://arxiv.org/abs/2510.05491"),
    "Polar Express": Change(muon={"coefficients": POLAR_EXPRESS}, source="https://arxiv.org/abs/2505.16932"),
    "4 iterations": Change(muon={"coefficients": COEFFICIENTS[:4]}),
    "3 iterations": Change(muon={"coefficients": COEFFICIENTS[:3]}),
    "cautious weight decay": Change(muon={"cautious": True}, source="https://arxiv.org/abs/2510.12402"),
}


class StudiedMuon(Muon):
    """Muon with changes.

    normalized: rows (or columns of a wide matrix) of the update have equal mean squares over time. coefficients: of
    `orthogonalize`. cautious: only weights that the update makes smaller decay. warm_up_steps: in which the momentum
    rises.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        normalized: bool = False,
        coefficients: Sequence[tuple[float, float, float]] = COEFFICIENTS,
        cautious: bool = False,
        warm_up_steps: int = 0,
        momentum: float = MOMENTUM,
        **options: Any,
    ) -> None:
        super().__init__(params, momentum=momentum, **options)
        self.normalized, self.coefficients, self.cautious = normalized, coefficients, cautious
        self.last_momentum, self.warm_up_steps, self.steps = self.momentum, warm_up_steps, 0

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all matrices."""
        if self.steps < self.warm_up_steps:
            self.momentum = FIRST_MOMENTUM + (self.last_momentum - FIRST_MOMENTUM) * self.steps / self.warm_up_steps
        else:
            self.momentum = self.last_momentum
        self.steps += 1
        super().step(closure)

    def decay(self, part: Tensor, update: Tensor, share: float) -> None:
        """All weights decay, or only those that the update makes smaller."""
        part.mul_(1 - share * (update * part > 0).to(part.dtype) if self.cautious else 1 - share)

    def updates(self, parameters: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
        """Orthogonalized, and normalized if that is the change."""
        found = [orthogonalize(part, self.dtype, self.coefficients) for part in parts]
        return [self._normalize(p, update) for p, update in zip(parameters, found, strict=True)]

    def _normalize(self, parameter: Tensor, update: Tensor) -> Tensor:
        if not self.normalized:
            return update
        rows, columns = update.shape
        squares = update.square().mean(1 if rows >= columns else 0, keepdim=True)
        mean: Tensor = self.state[parameter].setdefault("mean_squares", torch.zeros_like(squares))
        mean.lerp_(squares, 0.05)
        scaled = update * mean.clamp_min(1e-10).rsqrt()
        ratio: Tensor = update.norm() / scaled.norm()
        return scaled * ratio


def main() -> None:
    """Trains what the report lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--only", default="", help="changes with this in their name")
    arguments = parser.parse_args()
    from stages.params import load_params

    laptop = load_params(Path("presets/laptop.yaml"))
    path = REPORT / "ablations.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.is_file() else []
    for seed in range(laptop.train.seed, laptop.train.seed + arguments.seeds):
        for name, change in CHANGES.items():
            is_known = any((known["change"], known["seed"]) == (name, seed) for known in runs)
            if is_known or arguments.only not in name:
                continue
            short = {"max_steps": STEPS, "warmup_steps": WARM_UP, "eval_interval": STEPS, "seed": seed}
            config = replace(laptop.train, **{**short, "dropout": 0.0, "weight_decay": 0.1, **change.train})
            curve = run(laptop, config, partial(StudiedMuon, **change.muon), change.averaged_steps)
            runs.append({"change": name, "seed": seed, "val_loss": curve["val_loss"][-1]})
            print(f"{name}, seed {seed}: {curve['val_loss'][-1]:.4f}", flush=True)
            REPORT.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "runs": runs}, indent=1) + "\n")
    (REPORT / "ablations.md").write_text(table(runs))


def difference(runs: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """Mean difference of a change to the base on the same seeds, and the half-width of its 95 % t interval."""
    losses = {(one["change"], one["seed"]): one["val_loss"] for one in runs}
    seeds = [seed for change, seed in losses if change == name and (BASE, seed) in losses]
    pairs = [losses[name, seed] - losses[BASE, seed] for seed in seeds]
    if len(pairs) < 2:
        return statistics.mean(pairs or [math.nan]), math.inf
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return statistics.mean(pairs), float(student_t.ppf(0.975, len(pairs) - 1)) * error


def table(runs: list[dict[str, Any]]) -> str:
    """The report in Markdown."""
    lines = [
        "# Ablations",
        "",
        f"Made by `python -m benchmarks.ablations`: the validation loss after {STEPS} steps of the preset `laptop`, "
        "with weight decay 0.1 and momentum 0.95, and the mean difference of a change to that on the same seeds with "
        "its 95 % interval. A negative difference is better.",
        "",
        "| change | seeds | validation loss | difference |",
        "|---|---:|---:|---:|",
    ]
    for name, change in CHANGES.items():
        losses = [one["val_loss"] for one in runs if one["change"] == name]
        if not losses:
            continue
        shown = f"[{name}]({change.source})" if change.source else name
        mean, width = difference(runs, name)
        told = "" if name == BASE else f"{mean:+.3f} ({mean - width:+.3f} to {mean + width:+.3f})"
        lines.append(f"| {shown} | {len(losses)} | {statistics.mean(losses):.3f} | {told} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
