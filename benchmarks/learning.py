"""Loss against steps and against seconds: the baseline recipe, tuned AdamW, and Muon planned for two lengths.

    python -m benchmarks.learning                   three seeds, about 25 minutes on two cores
    python -m benchmarks.learning --only planned    one recipe again, beside the others of the report

Uses the model and the batch of the preset laptop and the tokens of the last pipeline run. The baseline is the plain
fp32 training script of the original project, with an embedding for each token; its own step (not compiled) is timed in
the same run. No recipe reads the text more than twice: all have a weight decay of 0.1, and no dropout. Writes
reports/benchmarks/learning.{json,md,png}.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2.optimizers.muon import Muon

REPORT = Path("reports/benchmarks")
EVAL_INTERVAL = 20
VALIDATION_TOKENS = 9217
"""The first quarter of the held-out text of Tiny Shakespeare."""
RECIPES: dict[str, dict[str, Any]] = {
    "baseline recipe": {},  # presets/seed.yaml
    "tuned AdamW": {"optimizer": "adamw", "learning_rate": 1.0e-3, "min_learning_rate": 1.0e-4, "schedule": "cosine"},
    "Muon": {},  # presets/laptop.yaml, with weight decay 0.1
    "Muon, planned for 24 % of the steps": {"share": 0.24, "warmup_steps": 2, "learning_rate": 6e-3},
}
COLORS = {"baseline recipe": "#64748b", "tuned AdamW": "#2563eb", "Muon": "#c2410c"} | {
    "Muon, planned for 24 % of the steps": "#15803d"
}


class SilentCallbacks:
    """Callbacks of a training run that only needs its history."""

    def log(self, row: Any) -> None:
        """Nothing."""

    def progress(self, state: Any, loss: float, tokens_per_s: float) -> None:
        """Nothing."""

    def save(self, step: int, content: Any, last: bool) -> None:
        """Nothing."""

    def warn(self, message: str) -> None:
        """Prints it."""
        print(message)

    def should_stop(self) -> bool:
        """No."""
        return False


def main() -> None:
    """Trains each recipe with each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--only", default="", help="recipes with this in their name")
    arguments = parser.parse_args()
    from stages.params import load_params

    laptop, seed = (load_params(Path(f"presets/{name}.yaml")) for name in ("laptop", "seed"))
    if arguments.steps <= seed.train.warmup_steps or arguments.seeds < 1:
        parser.error(f"at least one seed, and more steps than the baseline recipe's warm-up, {seed.train.warmup_steps}")
    taken = [
        *("optimizer", "learning_rate", "min_learning_rate", "schedule", "warmup_steps", "weight_decay", "beta2"),
        "min_token_count",
    ]
    recipes = {**RECIPES, "baseline recipe": {name: getattr(seed.train, name) for name in taken}}
    path = REPORT / "learning.json"
    if arguments.only and not path.is_file():
        parser.error(f"{path} is not there: run it without --only first")
    known = json.loads(path.read_text()) if arguments.only else {"runs": []}
    baseline_step_s = known.get("baseline_step_s") or time_baseline_step(laptop)
    runs = [curve for curve in known["runs"] if arguments.only not in curve["recipe"]]
    for number in range(arguments.seeds):
        for name, recipe in recipes.items():
            if arguments.only not in name:
                continue
            once = {"dropout": 0.0, "weight_decay": 0.1}
            changes = {**once, "max_steps": arguments.steps, **recipe}
            changes["max_steps"] = round(changes["max_steps"] * changes.pop("share", 1.0))
            config = replace(laptop.train, **changes, seed=laptop.train.seed + number, eval_interval=EVAL_INTERVAL)
            curve = run(laptop, config)
            runs.append({"recipe": name, "seed": config.seed, **curve})
            print(
                f"{name}, seed {config.seed}: best {min(curve['val_loss']):.3f}, {curve['seconds'][-1]:.0f} s",
                flush=True,
            )
    result = {"date": time.strftime("%Y-%m-%d"), "baseline_step_s": baseline_step_s, "runs": runs}
    REPORT.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result) + "\n")
    write_table(result)
    draw(result)


class LastMean:
    """The mean of a model's weights after each of the last steps of a run."""

    def __init__(self, model: Any, optimizer: Any, first_step: int) -> None:
        """model: a `MixedPrecisionModel`. first_step: counted from 1."""
        self.model, self.weights = model, list(model.master.parameters())
        self.steps, self.first_step = 0, first_step
        self.means: list[Any] = []
        self._update, optimizer.step = optimizer.step, self._step

    def _step(self) -> None:
        self._update()
        self.steps += 1
        if self.steps == self.first_step:
            self.means = [weight.detach().clone() for weight in self.weights]
        if not self.means:
            return
        for mean, weight in zip(self.means, self.weights, strict=True):
            mean.lerp_(weight.detach(), 1 / (self.steps - self.first_step + 1))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the mean weights meanwhile, if the first step is done."""
        kept = [weight.detach().clone() for weight in self.weights]
        self._set(self.means or kept)
        yield
        self._set(kept)

    def _set(self, values: list[Any]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.data.copy_(value)
        self.model.cast_weights()


def run(params: Any, config: Any, muon_type: Any = Muon, averaged_steps: int = 0) -> dict[str, list[float]]:
    """The validation losses of a training run, with their steps and seconds of training.

    muon_type: as of Optimizer. averaged_steps: last steps whose weights are averaged.
    """
    import torch

    from gpt2.data.sampler import Sampler
    from gpt2.data.token_files import open_tokens
    from gpt2.device import choose_device, choose_precision, configure_device
    from gpt2.model.transformer import GPT
    from gpt2.optimizers.optimizer import Optimizer
    from gpt2.progress import ProgressCallback
    from gpt2.training.mixed_precision import MixedPrecisionModel
    from gpt2.training.state import TrainState
    from gpt2.training.trainer import Trainer
    from gpt2.training.validation import validation_loss
    from gpt2.training.vocabulary import text_vocabulary
    from stages import paths

    device = choose_device("auto")
    configure_device(device)
    torch.manual_seed(config.seed)
    tokens = open_tokens(paths.TOKENS, "train")
    vocabulary = text_vocabulary(tokens, config, params.model.vocab_size)
    model = GPT(vocabulary.config(params.model) if vocabulary else params.model).to(device)
    model.dropout = config.dropout
    precision = choose_precision(device, "auto")
    compute = MixedPrecisionModel(model, precision, vocabulary=vocabulary)
    sampler = Sampler(tokens, config)
    torch._dynamo.reset()
    compute.compile(config.batch_size, config.sequence_length)
    validation = open_tokens(paths.TOKENS, "val")[:VALIDATION_TOKENS]
    state, evaluated_s = TrainState.initial(precision, config.batch_size), 0.0
    seconds = []

    def validate(batch_size: int, progress: ProgressCallback) -> float:
        nonlocal evaluated_s
        seconds.append(state.elapsed_s - evaluated_s)
        start_s = time.perf_counter()
        with mean.in_place() if mean else nullcontext():
            loss = validation_loss(
                compute, validation, sequence_length=config.sequence_length, batch_size=batch_size, progress=progress
            )
        evaluated_s += time.perf_counter() - start_s
        return loss

    optimizer = Optimizer(model, config, muon_type, precision)
    mean = LastMean(compute, optimizer, config.max_steps - averaged_steps + 1) if averaged_steps else None
    Trainer(compute, optimizer, sampler, validate, config, state, SilentCallbacks(), log_interval=10**9).train()
    return {
        "step": [float(row["step"] or 0) for row in state.history],
        "val_loss": [float(row["val_loss"] or 0) for row in state.history],
        "seconds": seconds,
    }


def time_baseline_step(params: Any) -> float:
    """Seconds of the baseline's step: fp32, not compiled, all logits at once."""
    import torch

    from benchmarks.plain import PlainGPT, plain_step
    from gpt2.device import choose_device

    device = choose_device("auto")
    size = (params.train.batch_size, params.train.sequence_length)
    batch = tuple(torch.randint(0, params.model.vocab_size, size, device=device) for _ in range(2))
    model = PlainGPT(params.model).to(device)
    batches: Any = [batch] * params.train.gradient_accumulation_steps
    step = plain_step(model, model, batches, torch.float32, device)
    seconds = []
    for _ in range(12):
        start_s = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start_s)
    return statistics.median(seconds[2:])


def reached(curve: dict[str, Any], loss: float, axis: str) -> float:
    """The first value on an axis at which a curve reaches a loss; NaN if it never does."""
    return next((x for x, y in zip(curve[axis], curve["val_loss"], strict=True) if y <= loss), float("nan"))


def write_table(result: dict[str, Any]) -> None:
    """reports/benchmarks/learning.md."""
    runs = result["runs"]
    baseline = {run["seed"]: run for run in runs if run["recipe"] == "baseline recipe"}
    lines = [
        "# Learning, side by side",
        "",
        f"Made by `python -m benchmarks.learning` ({result['date']}); the curves are in learning.json. Each line is "
        "the mean over the seeds, with minimum and maximum. The target is the best validation loss of the baseline "
        "recipe.",
        "",
        "| | best validation loss | steps to the target | of the baseline's | seconds to the target "
        "| of the baseline recipe's | of the baseline script's |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]

    def shown(values: list[float], form: str) -> str:
        return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    for recipe in RECIPES:
        of_recipe = [run for run in runs if run["recipe"] == recipe]
        targets = [min(baseline[run["seed"]]["val_loss"]) for run in of_recipe]
        pairs = list(zip(of_recipe, targets, strict=True))
        steps, seconds = ([reached(run, target, axis) for run, target in pairs] for axis in ("step", "seconds"))
        baseline_steps, baseline_s = (
            [reached(baseline[run["seed"]], target, axis) for run, target in pairs] for axis in ("step", "seconds")
        )
        baseline_script_s = [step * result["baseline_step_s"] for step in baseline_steps]
        lines.append(
            f"| {recipe} | {shown([min(run['val_loss']) for run in of_recipe], '.3f')} | {shown(steps, '.0f')} "
            f"| {statistics.mean(steps) / statistics.mean(baseline_steps):.0%} | {shown(seconds, '.0f')} "
            f"| {statistics.mean(seconds) / statistics.mean(baseline_s):.0%} "
            f"| {statistics.mean(seconds) / statistics.mean(baseline_script_s):.0%} |"
        )
    lines += [
        "",
        f"The baseline's step takes {result['baseline_step_s']:.3f} s; all recipes ran in our training loop.",
    ]
    (REPORT / "learning.md").write_text("\n".join(lines) + "\n")


def draw(result: dict[str, Any]) -> None:
    """reports/benchmarks/learning.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    labelled = set()
    for curve in result["runs"]:
        recipe = curve["recipe"]
        label = None if recipe in labelled else recipe
        labelled.add(recipe)
        by_step.plot(curve["step"], curve["val_loss"], color=COLORS[recipe], linewidth=1.3, label=label)
        by_time.plot(curve["seconds"], curve["val_loss"], color=COLORS[recipe], linewidth=1.3)
        if recipe == "baseline recipe":
            baseline_s = [step * result["baseline_step_s"] for step in curve["step"]]
            label = None if "own" in labelled else "the same, in the baseline's step"
            labelled.add("own")
            by_time.plot(baseline_s, curve["val_loss"], color=COLORS[recipe], linewidth=1.0, linestyle=":", label=label)
    by_step.set(xlabel="step", ylabel="validation loss, nats per token", ylim=(None, 7.5))
    by_time.set(xlabel="seconds of training")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(REPORT / "learning.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
