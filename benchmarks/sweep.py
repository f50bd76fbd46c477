"""Sweeps: a pruned one beside random search, and what a trial costs besides its training.

    python -m benchmarks.sweep --search       three seeds, about five minutes on one core
    python -m benchmarks.sweep --overhead     a tiny run as `dvc exp run --temp` and as a trial (ten minutes)

`--search` trains a tiny model on the bytes of the last pipeline run's corpus, in this process, with one thread. It
takes the space, the sampler and the pruner of sweep.yaml, and the sweep's study code. The reference is as many full
trials with random values. Time is CPU time of the process, which other programs on the machine change little.
`--overhead` runs the real commands in a temporary repository, in turns. Writes reports/benchmarks/sweep.{json,md}.
"""

import argparse
import csv
import importlib
import json
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

REPORT = Path("reports/benchmarks")
MODEL = {"block_size": 32, "vocab_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 48}
"""A model of bytes: GPT-2's vocabulary would take nine tenths of the time of so small a model."""
STEPS, EVAL_INTERVAL = 240, 24
MIN_STEPS = 24
"""A tenth of a trial, before which none is pruned."""
TRAIN_BYTES, VALIDATION_BYTES = 1_000_000, 2049
BATCH: dict[str, Any] = {"batch_size": 8, "sequence_length": 32, "gradient_accumulation_steps": 1}


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="pruned search beside random search")
    parser.add_argument("--overhead", action="store_true", help="what a trial costs besides its training")
    parser.add_argument("--seeds", type=int, default=3, help="of the search (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=40, help="of each search (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="trials of each way (default: %(default)s)")
    arguments = parser.parse_args()
    new: dict[str, Any] = {"machine": cpu()}
    if arguments.search:
        new["search"] = [search(seed, arguments.trials) for seed in range(arguments.seeds)]
    if arguments.overhead:
        new["overhead"] = overhead(arguments.rounds)
    path = REPORT / "sweep.json"
    results = {**(json.loads(path.read_text()) if path.is_file() else {}), **new}
    REPORT.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    (REPORT / "sweep.md").write_text(table(results))
    print(table(results))


def search(seed: int, count: int, train: Callable[..., Any] | None = None) -> dict[str, Any]:
    """A pruned search, and as many full random trials. train: in the place of `Tiny.train`, for tests."""
    import optuna

    from experiments.sweeping.config import PrunerConfig, load_sweep
    from experiments.sweeping.study import best_of, make_pruner, make_sampler

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config, _ = load_sweep(Path("sweep.yaml"), Path("params.yaml"))
    pruner = PrunerConfig("asha", 0, MIN_STEPS, config.pruner.reduction_factor)
    result: dict[str, Any] = {"seed": seed + 1}
    train = train or Tiny().train
    for way in ("random", "sweep"):
        sampler = replace(config.sampler, seed=seed + 1, name="tpe" if way == "sweep" else "random")
        study = optuna.create_study(pruner=make_pruner(pruner if way == "sweep" else replace(pruner, name="none")))
        distributions = {name: param.distribution() for name, param in config.space.items()}
        spent_s, bests = 0.0, []
        for number in range(count):
            study.sampler = make_sampler(replace(config, sampler=sampler), number)
            trial = study.ask(distributions)
            start_s = time.process_time()
            loss = train(trial)
            spent_s += time.process_time() - start_s
            state = optuna.trial.TrialState.PRUNED if loss is None else optuna.trial.TrialState.COMPLETE
            study.tell(trial, loss, state)
            best = best_of(study.trials, "minimize")
            bests.append((round(spent_s, 2), best and best.value))
        steps = sum(each.last_step or 0 for each in study.trials)
        pruned = sum(each.state.name == "PRUNED" for each in study.trials)
        result[way] = {"seconds": spent_s, "steps": steps, "pruned": pruned, "best": study.best_value, "bests": bests}
        print(f"seed {seed + 1}, {way}: best {study.best_value:.4f}, {spent_s:.0f} s, {pruned} pruned", flush=True)
    return result


class Tiny:
    """A tiny training, with one thread, whose validation loss a trial follows."""

    def __init__(self) -> None:
        import numpy as np
        import torch

        from gpt2.config import GPTConfig
        from stages import paths
        from stages.params import load_params

        torch.set_num_threads(1)
        self.model = GPTConfig(**MODEL)
        self.base = replace(
            load_params(Path("params.yaml")).train, **BATCH, max_steps=STEPS, eval_interval=EVAL_INTERVAL
        )
        text = np.frombuffer(paths.CORPUS.read_bytes(), np.uint8).astype(np.uint16)
        self.tokens, self.validation = text[:TRAIN_BYTES], text[TRAIN_BYTES:][:VALIDATION_BYTES]

    def train(self, trial: Any) -> float | None:
        """The best validation loss; None if the trial is pruned or diverges."""
        import torch

        from gpt2.data.sampler import Sampler
        from gpt2.errors import DivergedError
        from gpt2.model.transformer import GPT
        from gpt2.optimizers.optimizer import Optimizer
        from gpt2.training.mixed_precision import MixedPrecisionModel
        from gpt2.training.state import TrainState
        from gpt2.training.trainer import Trainer
        from gpt2.training.validation import validation_loss

        config = replace(self.base, **{name.removeprefix("train."): value for name, value in trial.params.items()})
        config = replace(config, eval_interval=EVAL_INTERVAL)
        torch.manual_seed(config.seed)
        model = MixedPrecisionModel(GPT(self.model), torch.float32)
        state = TrainState.initial(torch.float32, config.batch_size)
        callbacks = _Follow(trial)

        def validate(batch_size: int, progress: Any) -> float:
            return validation_loss(
                model, self.validation, sequence_length=config.sequence_length, batch_size=batch_size, progress=progress
            )

        sampler = Sampler(self.tokens, config)
        trainer = Trainer(
            model, Optimizer(model.master, config), sampler, validate, config, state, callbacks, log_interval=STEPS
        )
        try:
            return float(state.best_val_loss) if trainer.train() else None
        except DivergedError:
            return None


class _Follow:
    """Callbacks that report the validation loss to a trial, and stop the training when the pruner says so."""

    def __init__(self, trial: Any) -> None:
        self.trial, self.is_pruned = trial, False

    def log(self, row: Any) -> None:
        if row["val_loss"] is not None:
            self.trial.report(row["val_loss"], row["step"])
            self.is_pruned = row["step"] < STEPS and self.trial.should_prune()

    def progress(self, state: Any, loss: float, tokens_per_s: float) -> None:
        """Nothing."""

    def save(self, step: int, content: Any, last: bool) -> None:
        """Nothing."""

    def warn(self, message: str) -> None:
        print(message)

    def should_stop(self) -> bool:
        return self.is_pruned


def overhead(rounds: int) -> dict[str, list[float]]:
    """Seconds of a tiny run besides its training: as `dvc exp run --temp`, all of it and to train, and as a trial."""
    make_project: Any = importlib.import_module("tests.project").Project
    found: dict[str, list[float]] = {"dvc exp run --temp": [], "dvc exp run --temp train": [], "trial": []}
    cpu: dict[str, list[float]] = {name: [] for name in found}
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder))
        shutil.copyfile("sweep.yaml", project.folder / "sweep.yaml")
        project.run("dvc", "repro")
        project.run("git", "add", "-A")
        project.run("git", "commit", "-qm", "run")
        for number in range(rounds):
            for name, target in (("dvc exp run --temp", []), ("dvc exp run --temp train", ["train"])):
                command = ["dvc", "exp", "run", "--temp", "-n", f"{len(target)}-{number}", *target]
                start_s, start_cpu_s = time.perf_counter(), _children_s()
                project.run(*command, "-S", f"train.seed={100 * len(target) + number}")
                found[name].append(time.perf_counter() - start_s - _trained_s(project, command[5]))
                cpu[name].append(_children_s() - start_cpu_s)
            sweep(project, f"round{number}", number, trials=1)  # the first trial of a worker is cold
            start_cpu_s = _children_s()
            times = sweep(project, f"rounds{number}", 50 + number, trials=3)
            cpu["trial"].append((_children_s() - start_cpu_s) / 3)
            found["trial"] += times
            print({name: [round(value, 1) for value in values] for name, values in found.items()}, flush=True)
    return {**found, **{f"{name}, CPU": values for name, values in cpu.items()}}


def sweep(project: Any, name: str, seed: int, trials: int) -> list[float]:
    """Seconds of each trial of a sweep besides its training."""
    (project.folder / "sweep.yaml").write_text(
        f"name: {name}\nobjective: train.best_val_loss\ndirection: minimize\n"
        f"sampler: {{name: random, seed: {seed}, startup_trials: 1}}\n"
        "pruner: {name: none, startup_trials: 0, min_steps: 4, reduction_factor: 3}\n"
        f"budget: {{trials: {trials}, minutes: null}}\nset: null\n"
        "space:\n  train.learning_rate: {low: 1.0e-3, high: 1.0e-2}\n"
    )
    subprocess.run([sys.executable, "-m", "gpt2", "sweep"], cwd=project.folder, env=project.environment, check=True)
    with (project.folder / f"reports/sweep/{name}/trials.csv").open() as file:
        return [float(row["seconds"]) - _trained_s(project, row["experiment"]) for row in csv.DictReader(file)]


def _trained_s(project: Any, experiment: str) -> float:
    refs = project.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").split()
    (ref,) = [ref for ref in refs if ref.endswith(f"/{experiment}")]
    return float(json.loads(project.run("git", "show", f"{ref}:reports/train/metrics.json"))["elapsed_s"])


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cpu() -> str:
    """The name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def reached_at(result: dict[str, Any]) -> float | None:
    """Seconds until the sweep had the best loss of random search; None: never."""
    goal = result["random"]["best"]
    return next((spent for spent, best in result["sweep"]["bests"] if best is not None and best <= goal), None)


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = ["# Sweeps", "", f"Machine: {results.get('machine', '')}", ""]
    if rows := results.get("search"):
        lines += ["Validation loss and CPU seconds of training, one thread.", ""]
        lines += [
            "| seed | random: best | seconds | sweep: best | seconds | pruned | share | reached random's best after |"
        ]
        lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
        for row in rows:
            random, ours, at = row["random"], row["sweep"], reached_at(row)
            share, after = (
                ours["seconds"] / random["seconds"],
                "never" if at is None else f"{at / random['seconds']:.0%}",
            )
            lines.append(
                f"| {row['seed']} | {random['best']:.4f} | {random['seconds']:.0f} | {ours['best']:.4f} | "
                f"{ours['seconds']:.0f} | {ours['pruned']} | {share:.0%} | {after} |"
            )
        lines.append("")
    if rows := results.get("overhead"):
        lines += [
            "Seconds of a tiny run besides its training.",
            "",
            "| | median | CPU | lowest | highest |",
            "|---|---:|---:|---:|---:|",
        ]
        for name, values in rows.items():
            if not name.endswith(", CPU"):
                cpu_s = statistics.median(rows[f"{name}, CPU"])
                middle = statistics.median(values)
                lines.append(f"| {name} | {middle:.1f} | {cpu_s:.1f} | {min(values):.1f} | {max(values):.1f} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
