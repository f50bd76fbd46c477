"""Signals and kills of the real command line: plain `python -m stages.train`, and the same through DVC."""

import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.faults.result import Result
from tests.project import Project

SHIM = Path(__file__).parent / "shim"
NUMBERS = ("step", "train_loss", "val_loss", "learning_rate", "grad_norm", "tokens")
PLAIN = [sys.executable, "-m", "stages.train"]
THROUGH_DVC = ["dvc", "repro", "--single-item", "train"]
QUICK = {"max_steps": 30, "eval_interval": 10, "gradient_accumulation_steps": 2}
RUNTIME = {"checkpoint_interval": 3, "log_interval": 1, "precision": "fp32", "compile": "never"}


class Trained:
    """A project after an undisturbed run, to copy. expected: the results that each run with a fault must reach."""

    def __init__(self, folder: Path, **runtime: Any) -> None:
        folder.mkdir(parents=True)
        self.strategy = runtime.get("strategy", "auto")
        self.project = Project(folder)
        self.project.change(train=QUICK, runtime={**RUNTIME, **runtime})
        self.project.run("dvc", "repro", "tokenize")
        self.project.run(*PLAIN)  # also creates MLflow's database, which takes seconds
        self.expected = results(self.project)

    @cached_property
    def seconds(self) -> float:
        """What the same run takes in processes of its own, with MLflow's database there; measured once."""
        return self.measured_s()

    def measured_s(self) -> float:
        """What it takes now."""
        forget(self.project)
        started_s = time.monotonic()
        again = Command(self.project, PLAIN)
        problem = again.problem(again.wait(), 0)
        assert problem is None, problem
        return time.monotonic() - started_s

    def copy(self, folder: Path) -> Project:
        """Copies the project."""
        shutil.copytree(self.project.folder, folder, symlinks=True)
        copy = Project.__new__(Project)
        copy.folder = folder
        return copy


def results(project: Project) -> dict[str, Any]:
    """The results that must be bitwise identical in two runs."""
    models = project.folder / "models"
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(models.glob("*.safetensors"))}
    with (project.folder / "reports/train/history.csv").open() as file:
        history = [[row[name] for name in NUMBERS] for row in csv.DictReader(file)]
    live = next(project.folder.glob("checkpoints/*/history.jsonl")).read_text().splitlines()
    return {**sums, "history": history, "live": [[json.loads(line)[name] for name in NUMBERS] for line in live]}


def forget(project: Project) -> None:
    """Deletes all results of training. Keeps what was measured of the machine, checkpoints/peak-flops.json."""
    runs = [path for path in project.folder.glob("checkpoints/*") if path.is_dir()]
    project.run("rm", "-rf", ".dvc/cache/runs", "models", "reports", "mlflow-outbox", *map(str, runs))
    with suppress(OSError):
        (project.folder / "dvc.lock").write_text((project.folder / "dvc.lock").read_text().partition("  train:")[0])


class Command:
    """A command that runs in a project."""

    def __init__(self, project: Project, command: list[str], *, is_warm: bool = False, **environment: str) -> None:
        """is_warm: stages may be forks (tests/warm.py), which no fault is to hit. environment: changes to it."""
        self.log = (project.folder / "command.log").open("w+")
        words, usual = project.warm(command) if is_warm else (command, project.environment)
        self.process = subprocess.Popen(
            words,
            cwd=project.folder,
            env={**usual, **environment},
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, timeout_s: float = 120) -> int:
        """Returns the exit code; that of the stage if it ran through DVC."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return -1
        digits = self.output().rpartition("exited with ")[2][:3]
        return int("".join(filter(str.isdigit, digits)) or code) if code == 255 else code

    def output(self) -> str:
        """Its output so far."""
        self.log.seek(0)
        return self.log.read()

    def kill(self) -> None:
        """Kills it and its children with SIGKILL, except the uploader process, which ends by itself."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def problem(self, code: int, expected: int) -> str | None:
        """Describes a wrong exit; None if it is right."""
        output = self.output()
        if "Traceback" in output:
            return f"traceback: {output[-2000:]}"
        return None if code == expected else f"exit code {code} instead of {expected}: {output[-600:]}"


def finish(project: Project, command: list[str]) -> str | None:
    """Runs a command to its end. Describes its failure, or returns None."""
    again = Command(project, command, is_warm=True)
    return again.problem(again.wait(), 0)


PHASES = {
    "import": ("train", "gpt2.training.trainer::1"),
    "data": ("train", "gpt2.data.token_files:open_tokens:2"),
    "step": ("train", "gpt2.optimizers.optimizer:Optimizer.step:7"),
    "accumulation": ("train", "gpt2.training.mixed_precision:MixedPrecisionModel.loss:8"),
    "evaluation": ("train", "gpt2.data.sampler:windows:1"),
    "saving": ("train", "gpt2.files:write_folder:3"),
    "flushing": ("train", "stages.tracking.run:Run.end:1"),
    "sampling": ("evaluate", "gpt2.inference.kv_cache:window_start:9"),
}
TEST_TIMEOUT_S = 30.0
"""For tests on a busy machine; `make soak` allows less."""


def signal_in_phase(
    project: Project, phase: str, through_dvc: bool, expected: dict[str, Any], result: Result, within_s: float
) -> str | None:
    """Sends SIGTERM in a phase, then runs the same command again. Describes a failure, or returns None."""
    stage, fault = PHASES[phase]
    plain = [sys.executable, "-m", f"stages.{stage}"]
    command = ["dvc", "repro", "--single-item", "--force", stage] if through_dvc else plain
    if stage == "train":
        forget(project)
    sent = project.folder / "sent"
    sent.unlink(missing_ok=True)
    interrupted = Command(project, command, PYTHONPATH=str(SHIM), FAULT=fault, FAULT_SENT=str(sent))
    code = interrupted.wait()
    ended_s = time.time()
    if problem := interrupted.problem(code, 143):
        return problem
    if not sent.exists():
        return "the phase was not reached"
    took_s = ended_s - float(sent.read_text())
    result.notes.append(f"{phase}{' through DVC' if through_dvc else ''}: ended in {took_s:.1f} s")
    if took_s > within_s:
        return f"took {took_s:.1f} s to end"
    if through_dvc and stage in project.run("dvc", "status", stage) == "":
        return "DVC thinks that the stage is done"
    if problem := finish(project, command):
        return f"then {problem}"
    if stage == "train" and results(project) != expected:
        return "then another result"
    return None


def signals(
    folder: Path, trained: Trained, cases: Iterable[tuple[str, bool]], within_s: float = TEST_TIMEOUT_S
) -> Result:
    """Sends SIGTERM in phases, each plain or through DVC; two at the same time, in two projects."""
    result = Result("SIGTERM by phase, plain and through DVC")
    todo = list(cases)

    def lane(number: int) -> None:
        project = trained.copy(folder / f"signals-{number}")
        for phase, through_dvc in todo[number::2]:
            problem = signal_in_phase(project, phase, through_dvc, trained.expected, result, within_s)
            result.add(problem and f"{phase}{' through DVC' if through_dvc else ''}: {problem}")

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lane, (0, 1)))
    return result


def kills(folder: Path, trained: Trained, cases: int, seed: int = 0) -> Result:
    """Sends SIGKILL at random times, half of them through DVC; after five kills, the run continues to its end."""
    result = Result("SIGKILL of the real command line at random times")
    undisturbed_s = trained.seconds

    def lane(number: int) -> None:
        draw = random.Random(seed + number)
        project = trained.copy(folder / f"kills-{number}")
        command = THROUGH_DVC if number else PLAIN
        done = 0
        while done < cases // 2:
            forget(project)
            problem: str | None = "not finished"
            for _ in range(min(5, cases // 2 - done)):
                run = Command(project, command)
                try:
                    problem = run.problem(run.process.wait(draw.uniform(0.3, 0.9) * undisturbed_s), 0)
                    break
                except subprocess.TimeoutExpired:
                    run.kill()
                    done += 1
                    result.add(None)
            if problem:
                problem = finish(project, command)
            if not problem and results(project) != trained.expected:
                problem = "another result"
            if not problem and (doubled := steps_logged_twice(project)):
                problem = f"MLflow has steps twice: {doubled}"
            if problem:
                result.failures.append(f"{command}, after kill {done}: {problem}")

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lane, (0, 1)))
    return result


def steps_logged_twice(project: Project) -> list[str]:
    """The metrics of all MLflow runs that have a step more than once."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    doubled = []
    for run in client.search_runs([client.get_experiment_by_name("gpt2").experiment_id]):
        for key in (key for key in run.data.metrics if not key.startswith("system/")):
            steps = [metric.step for metric in client.get_metric_history(run.info.run_id, key)]
            if len(steps) != len(set(steps)):
                doubled.append(key)
    return doubled
