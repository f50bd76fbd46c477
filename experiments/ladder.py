"""`python -m gpt2 ladder`: the loss and the cost of a large run, predicted from small ones."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from experiments import sweep
from experiments.files import GitFiles
from experiments.runs import Run
from experiments.scaling.law import Fit, Interval, Point, fit
from experiments.sweeping.config import SweepConfig, load_sweep, try_params
from experiments.sweeping.study import SweepStudy
from experiments.sweeping.workspace import repository_root
from gpt2.data.token_files import read_index, split_sha256
from gpt2.errors import FileError, UserError
from gpt2.files import write_json, write_text
from gpt2.planning.hardware import build_cluster, find_gpu
from gpt2.planning.plan import Plan, best, plans
from gpt2.planning.plan import Run as PlannedRun
from gpt2.planning.report import human
from stages import paths
from stages.params import Params, load_params
from stages.process import echo

REPORT = Path("reports/ladder")
MIN_SIZES = 4
MAX_EPOCHS = 4
"""Up to so many, repeated text is nearly as good as new text: https://arxiv.org/abs/2305.16264."""
FREE = {"model": {"n_layer", "n_head", "n_embd"}, "train": {"max_steps", "warmup_steps", "eval_interval", "seed"}}
"""Params in which the large run and the small ones may differ, besides the batch."""


@dataclass(frozen=True)
class Target:
    """The run to predict. hours, dollars: on these GPUs; None if it does not fit them."""

    name: str
    params: Params
    tokens: int
    gpus: str
    plan: Plan | None

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return self.params.model.num_parameters()


@dataclass(frozen=True)
class Result:
    """A fitted ladder. left_out: the runs of the largest size, with what a fit to the others predicts for them."""

    points: list[Point]
    fit: Fit
    left_out: list[tuple[Point, Interval]]
    target: Target
    predicted: Interval
    notes: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--file", type=Path, default=Path("ladder.yaml"), help="default: %(default)s")
    parser.add_argument(
        "--target", type=Path, default=Path("presets/gpu.yaml"), help="params of the large run (default: %(default)s)"
    )
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="that it would run on (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs at once (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="show the runs and the expected minutes; run nothing")


def run(arguments: argparse.Namespace) -> int:
    """Trains what is missing, fits and predicts. Returns the exit code."""
    root = repository_root()
    target = load_target(arguments.target, arguments.gpu, arguments.gpus)
    config, base = load_sweep(arguments.file, paths.PARAMS)
    check(config, arguments.file, config.fixed.get("train.patience", base["train"]["patience"]))
    code = sweep.run(argparse.Namespace(**{**vars(arguments), "resume": False}))
    if code or arguments.dry_run:
        return code
    study = SweepStudy(root, config, base)
    study.find()
    result = predict(finished(study), target, training_tokens(study))
    write(result)
    for line in describe(result):
        echo(line)
    return 0


def check(config: SweepConfig, path: Path, patience: int | None) -> None:
    """Raises UserError unless the sweep is a ladder. patience: train.patience of the runs."""
    if config.objective not in ("train.best_val_loss", "train.last_val_loss") or config.direction != "minimize":
        raise UserError(f"{path}: objective is {config.objective!r}; a ladder minimizes train.best_val_loss")
    if config.sampler.name != "grid" or config.pruner.name != "none":
        raise UserError(f"{path}: a ladder needs sampler.name grid and pruner.name none, so that all runs end")
    if patience is not None:
        raise UserError(
            f"{path}: train.patience is {patience}; set it to null here, as the law counts all planned tokens"
        )


def load_target(path: Path, gpu_name: str, gpus: int) -> Target:
    """The large run of a params file. Raises UserError."""
    params, gpu = load_params(path), find_gpu(gpu_name)
    train = params.train
    tokens = train.tokens_per_step * train.max_steps
    sequences = train.batch_size * train.gradient_accumulation_steps
    planned = PlannedRun(params.model, sequences, train.sequence_length, tokens, train.optimizer)
    speed, price = gpu.mfu * gpu.peak_flops, gpu.dollars_per_hour
    found = plans(planned, gpu, build_cluster(gpu, gpus), flops_per_s=speed, dollars_per_hour=price)
    return Target(path.stem, params, tokens, f"{gpus} x {gpu.title}", best(found))


def finished(study: SweepStudy) -> list[tuple[Params, float]]:
    """The params and the loss of each run that is complete."""
    found = []
    for trial in study.counted():
        params = try_params(study.config, study.base, trial.params)
        if trial.value is not None and isinstance(params, Params):
            found.append((params, trial.value))
    return found


def training_tokens(study: SweepStudy) -> int | None:
    """The training tokens of the text; None if those in the workspace are not those of the runs."""
    commits = (trial.user_attrs.get("commit") for trial in study.counted())
    commit = next((str(each) for each in commits if each), "HEAD")
    sums = Run(commit[:7], commit, GitFiles(study.root, commit)).environment.get("sha256", {})
    try:
        index = read_index(paths.TOKENS)
    except FileError:
        return None
    same = sums.get("train_tokens") == split_sha256(index, "train")
    return int(index["splits"]["train"]["tokens"]) if same else None


def predict(trained: Sequence[tuple[Params, float]], target: Target, text_tokens: int | None) -> Result:
    """Fits the law to all runs, and to all but those of the largest size. Raises UserError for too few runs."""
    points = [
        Point(params.model.num_parameters(), params.train.tokens_per_step * params.train.max_steps, loss)
        for params, loss in trained
    ]
    sizes = sorted({point.parameters for point in points})
    if len(sizes) < MIN_SIZES:
        raise UserError(
            f"a ladder needs {MIN_SIZES} sizes, one of them to check the fit to the others; there are {len(sizes)}"
        )
    fitted = fit(points)
    without = fit([point for point in points if point.parameters < sizes[-1]])
    left_out = [
        (point, without.predict(point.parameters, point.tokens)) for point in points if point.parameters == sizes[-1]
    ]
    predicted = fitted.predict(target.parameters, target.tokens)
    return Result(points, fitted, left_out, target, predicted, notes(trained, target, text_tokens))


def notes(trained: Sequence[tuple[Params, float]], target: Target, text_tokens: int | None) -> list[str]:
    """What makes the prediction less certain than its interval says."""
    found = []
    small = trained[0][0]
    for section, free in FREE.items():
        ours, theirs = getattr(small, section), getattr(target.params, section)
        for field in fields(ours):
            value, other = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name not in free and value != other:
                found.append(f"{section}.{field.name} is {other} in {target.name} and {value} in the small runs")
    if text_tokens:
        longest = max(params.train.tokens_per_step * params.train.max_steps for params, _ in trained)
        for name, tokens in (("the longest small run", longest), (target.name, target.tokens)):
            if tokens > MAX_EPOCHS * text_tokens:
                found.append(
                    f"{name} sees the text {tokens / text_tokens:.0f} times; the law is that of new text, which holds "
                    f"for about {MAX_EPOCHS} times: {human(tokens / MAX_EPOCHS)} training tokens would be enough"
                )
    return found


def describe(result: Result) -> list[str]:
    """The prediction and how far to trust it, in lines."""
    law, target, predicted = result.fit.law, result.target, result.predicted
    inside = sum(point.loss in interval for point, interval in result.left_out)
    size = result.left_out[0][0].parameters
    lines = [
        f"loss = {law.E:.3g} + {law.A:.3g} / N^{law.alpha:.3g} + {law.B:.3g} / D^{law.beta:.3g}; N parameters, "
        f"D tokens; the runs are {result.fit.noise:.2%} from it",
        f"without the runs of {human(size)} parameters, {inside} of {len(result.left_out)} of them are inside the "
        "95 % interval of the others' law",
        f"{target.name}, {human(target.parameters)} parameters and {human(target.tokens)} tokens: validation loss "
        f"{predicted.value:.3f} ({predicted.low:.3f} to {predicted.high:.3f})",
    ]
    if target.plan is None:
        lines.append(f"it does not fit {target.gpus}")
    else:
        lines.append(
            f"on {target.gpus}: about {target.plan.hours:.2g} hours, {target.plan.dollars:.2g} dollars "
            "(python -m gpt2 plan has the details)"
        )
    return [*lines, *(f"note: {note}" for note in result.notes)]


def write(result: Result) -> None:
    """Writes reports/ladder/."""
    from experiments.scaling.drawing import draw

    target, predicted = result.target, result.predicted
    content: dict[str, Any] = {
        "runs": [asdict(point) for point in result.points],
        "law": {**asdict(result.fit.law), "noise": result.fit.noise},
        "left_out": [{**asdict(point), "predicted": asdict(interval)} for point, interval in result.left_out],
        "target": {
            "name": target.name,
            "parameters": target.parameters,
            "tokens": target.tokens,
            "loss": asdict(predicted),
            "gpus": target.gpus,
            "hours": target.plan and target.plan.hours,
            "dollars": target.plan and target.plan.dollars,
        },
        "notes": result.notes,
    }
    write_json(REPORT / "ladder.json", content)
    rows = ["| parameters | tokens | loss | law |", "|---:|---:|---:|---:|"]
    for point in result.points:
        by_law = result.fit.law.loss(point.parameters, point.tokens)
        rows.append(f"| {point.parameters:,} | {point.tokens:,} | {point.loss:.4f} | {by_law:.4f} |")
    text = ["# Scaling ladder", "", "![Loss by FLOPs, and the law beside the runs](ladder.png)", ""]
    write_text(REPORT / "ladder.md", "\n".join([*text, *(f"- {line}" for line in describe(result)), "", *rows]) + "\n")
    draw(
        result.points, result.fit, result.left_out, (target.parameters, target.tokens, predicted), REPORT / "ladder.png"
    )
