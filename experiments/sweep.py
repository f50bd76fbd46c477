"""`python -m gpt2 sweep`: searches params with Optuna; each trial is a DVC experiment and an MLflow run."""

import argparse
import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.sweeping import summary
from experiments.sweeping.config import SweepConfig, load_sweep, try_params
from experiments.sweeping.space import LINK, grid, grid_size
from experiments.sweeping.study import SweepStudy, study_lock
from experiments.sweeping.workspace import (
    Clone,
    clone_folder,
    experiments_of,
    repository_root,
    require_snapshot,
    take_snapshot,
)
from gpt2.config import GPTConfig, TrainConfig
from gpt2.errors import BusyError, GPT2Error, Interrupted, UserError
from gpt2.files import file_lock
from stages import paths
from stages.params import Params, read_yaml
from stages.process import StopSignal, echo, warn

SAMPLES = 200
SHOWN_COMBINATIONS = 20
MAX_SLOTS = 64
MAX_RESTARTS = 5
"""Of a worker that is killed."""
POLL_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--file", type=Path, default=Path("sweep.yaml"), help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="trials at once (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="only go on with a study that is there")
    parser.add_argument("--dry-run", action="store_true", help="show the space and the expected minutes; run nothing")


def run(arguments: argparse.Namespace) -> int:
    """Runs the sweep. Returns the exit code."""
    root = repository_root()
    if not 1 <= arguments.workers <= MAX_SLOTS:
        raise UserError(f"--workers is {arguments.workers}; expected 1 to {MAX_SLOTS}")
    config, base = load_sweep(arguments.file, paths.PARAMS)
    possible = [params for values in samples(config) if isinstance(params := try_params(config, base, values), Params)]
    if not possible:
        problem = try_params(config, base, next(iter(samples(config))))
        raise UserError(f"{arguments.file}: no values of the space fit together: {problem}")
    if arguments.dry_run:
        describe(config, base, possible, arguments.workers)
        return 0
    stop = StopSignal()
    study = SweepStudy(root, config, base)
    definition = open_study(study, root, resume=arguments.resume)
    workers = Workers(root, arguments.file.absolute(), config, definition, stop)
    try:
        code = workers.run(arguments.workers)
    finally:
        summary.write(study, definition)
    if stop:
        done = len(summary.finished(study))
        assert stop.signal_number is not None
        raise Interrupted(f"interrupted after {done} trials; the same command goes on", stop.signal_number)
    return code


def samples(config: SweepConfig) -> list[dict[str, Any]]:
    """Values of trials: the grid, or random ones."""
    if config.sampler.name == "grid" and grid_size(config.space) <= SAMPLES:
        return list(grid(config.space))
    generator = random.Random(0)  # noqa: S311 - not for secrets
    return [{name: param.sample(generator) for name, param in config.space.items()} for _ in range(SAMPLES)]


def open_study(study: SweepStudy, root: Path, *, resume: bool) -> dict[str, Any]:
    """The definition of the study, which is created if it is missing."""
    name = study.config.name
    with study_lock(root, name):
        definition = study.find()
        if definition is not None:
            require_snapshot(root, name, definition)
            echo(f"going on with the study {name!r}: {len(summary.finished(study))} trials have ended")
            return definition
        if resume:
            raise UserError(f"there is no study {name!r} to resume; start it without --resume")
        if taken := experiments_of(root, name):
            raise UserError(
                f"there are experiments of an earlier sweep {name!r}; give sweep.yaml another name, or remove them: "
                f"dvc exp remove {' '.join(taken)}"
            )
        facts: dict[str, Any] = dict(take_snapshot(root, name))
        facts["mlflow_run_id"] = summary.start_parent(study.config, facts["base"])
        return study.create(facts)


@dataclass
class _Process:
    """A worker. slot: number of its clone."""

    process: "subprocess.Popen[bytes]"
    clone: Clone
    restarts: int = 0


class Workers:
    """Starts workers, and starts those that are killed again."""

    def __init__(
        self, root: Path, file: Path, config: SweepConfig, definition: Mapping[str, Any], stop: StopSignal
    ) -> None:
        self.root, self.file, self.config, self.definition, self.stop = root, file, config, definition, stop
        self.deadline = time.time() + 60 * config.minutes if config.minutes else math.inf

    def run(self, count: int) -> int:
        """Runs so many workers until all have ended. Returns the exit code of the first one that failed, or 0."""
        failed = 0
        with ExitStack() as held:
            clones = [self._clone(held) for _ in range(count)]
            running = [_Process(self._start(clone), clone) for clone in clones]
            told = False
            while running:
                if self.stop and not told:
                    told = True
                    for worker in running:
                        worker.process.terminate()
                for worker in list(running):
                    code = worker.process.poll()
                    if code is None:
                        continue
                    if code < 0 and not self.stop and worker.restarts < MAX_RESTARTS:
                        worker.restarts += 1
                        warn(f"a worker was killed by signal {-code}; another one takes over its trial")
                        worker.clone.prepare()
                        worker.process = self._start(worker.clone)
                        continue
                    running.remove(worker)
                    failed = failed or (code if code > 0 else 0 if code == 0 else 128 - code)
                time.sleep(POLL_S)
            if not failed and not self.stop:
                for clone in clones:  # with its copy of the tokens
                    shutil.rmtree(clone.folder, ignore_errors=True)
        return failed

    def _clone(self, held: ExitStack) -> Clone:
        """A clone that no other process uses."""
        for slot in range(MAX_SLOTS):
            folder = clone_folder(self.root, self.config.name, slot)
            try:
                held.enter_context(file_lock(folder.with_name(f"{folder.name}.lock")))
            except BusyError:
                continue
            clone = Clone(self.root, folder, self.definition["base"], self.definition["snapshot"])
            clone.prepare()
            return clone
        raise UserError(f"{MAX_SLOTS} workers run already")

    def _start(self, clone: Clone) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "experiments.sweeping.worker"]
        command += ["--root", str(self.root), "--file", str(self.file), "--deadline", str(self.deadline)]
        # a session of its own: Ctrl-C is for us, and the stages stop when we say so
        return subprocess.Popen(command, cwd=clone.folder, env=clone.environment(), start_new_session=True)


def describe(config: SweepConfig, base: Any, possible: list[Params], workers: int) -> None:
    """Prints the space, the grid if it is one, and the expected minutes."""
    count = config.trials
    if config.sampler.name == "grid":
        size = grid_size(config.space)
        count = min(size, count or size)
        echo(f"grid of {size} trials:")
        for index, values in enumerate(grid(config.space)):
            if index == SHOWN_COMBINATIONS:
                echo(f"  and {size - index} more")
                break
            echo("  " + ", ".join(f"{name} {value}" for name, value in values.items()))
    else:
        for name, param in config.space.items():
            now = (base[section][key] for section, _, key in (each.partition(".") for each in name.split(LINK)))
            echo(f"  {name}: {param} (now {', '.join(map(str, now))})")
    if len(possible) < (total := len(samples(config))):
        echo(f"{total - len(possible)} of {total} samples do not fit together and would be left out")
    echo(f"{config.direction} {config.objective} with {config.sampler.name}; pruner {config.pruner.name}")
    flops_per_s = measured_flops_per_s()
    if flops_per_s is None:
        echo("expected minutes: unknown before the first training here")
        return
    minutes = sum(training_flops(params) for params in possible) / len(possible) / flops_per_s / 60
    each = f"about {minutes:.2g} minutes of training for each trial"
    if count is None:
        echo(f"{each}; {config.minutes} minutes, that is, about {workers * (config.minutes or 0) / minutes:.0f} trials")
    else:
        echo(
            f"{count} trials, {each} without pruning: {count * minutes:.3g} minutes, by tokens/s of "
            "reports/train/metrics.json" + ("; workers share this machine's cores" if workers > 1 else "")
        )


def training_flops(params: Params) -> float:
    """FLOPs of a training."""
    train = params.train
    return float(flops_per_token(params.model, train) * train.tokens_per_step * train.max_steps)


def flops_per_token(model: GPTConfig, train: TrainConfig) -> int:
    """FLOPs of training on a token."""
    return model.flops_per_token(train.sequence_length, train.freeze_layers)


def measured_flops_per_s() -> float | None:
    """FLOP/s of the last training in the workspace: tokens/s of its report, and the params in dvc.lock."""
    try:
        params = read_yaml(Path("dvc.lock"), "")["stages"]["train"]["params"]["params.yaml"]
        model, train = GPTConfig(**params["model"]), TrainConfig(**params["train"])
        metrics = read_yaml(paths.TRAIN_REPORT / "metrics.json", "")
        return float(metrics["tokens_per_s"] * flops_per_token(model, train)) or None
    except (GPT2Error, KeyError, TypeError, ValueError):
        return None
