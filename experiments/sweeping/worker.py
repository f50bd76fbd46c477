"""A worker of a sweep, a process of its own: runs trials in its clone, one after the other.

    python -m experiments.sweeping.worker --root ROOT --file sweep.yaml

`python -m gpt2 sweep` starts it in the clone, so that it runs the code that the sweep started from.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.sweeping.config import load_sweep
from experiments.sweeping.preload import write_client
from experiments.sweeping.space import expanded
from experiments.sweeping.study import SweepStudy, best_of, locks
from experiments.sweeping.watch import Watch, partial_metrics, read_history, stop_stages
from experiments.sweeping.workspace import Clone
from gpt2.errors import GPT2Error, Interrupted, UserError
from gpt2.files import file_lock, write_json
from stages import paths
from stages.params import load_params
from stages.preflight import may_use_gpu
from stages.process import StopSignal, echo, request_sigterm_with_parent, warn
from stages.train import check

if TYPE_CHECKING:
    from optuna.trial import Trial

POLL_S = 0.1
BUSY_WAIT_S = 90.0
STOP_WAIT_S = 60.0
BUSY, DIVERGED = 75, 3
MAX_FAILURES = 3
"""Trials that fail one after the other, without one between them that does not."""
EXIT_CODE = re.compile(r"exited with (\d+)")


class Worker:
    """Runs trials until the budget is spent."""

    def __init__(self, study: SweepStudy, clone: Clone, parent_run: str | None, stop: StopSignal) -> None:
        """parent_run: MLflow's id of the sweep's own run."""
        self.study, self.clone, self.parent_run, self.stop = study, clone, parent_run, stop
        self.config = study.config
        self.logs = locks(study.root, self.config.name)
        self.path = os.environ["PATH"]
        self.failures = 0

    def run(self, deadline: float) -> None:
        """Runs trials until the budget is spent. deadline: of `time.time`, after which none begins."""
        prepare = ["dvc", "repro", "tokenize"]
        log = self.logs / f"tokens-{os.getpid()}.log"
        with file_lock(self.logs / "tokens.lock", wait_s=3600):  # the second worker takes them from DVC's cache
            if self._finish(self._start(prepare, log)):
                raise UserError(f"cannot make the tokens: {error_of(log)}")
        log.unlink(missing_ok=True)
        while time.time() < deadline:
            self.stop.check()
            with ExitStack() as held:
                trial = self.study.next_trial(held)
                if trial is None:
                    return
                self.run_trial(trial)

    def run_trial(self, trial: "Trial") -> None:
        """Trains with the values of a trial, makes an experiment of it, and tells Optuna."""
        from optuna.trial import TrialState

        name = f"{self.config.name}-{trial.number:03d}"
        values = {**self.config.fixed, **trial.params}
        self.clone.reset()
        self.clone.forget_reports(self.config.stage)
        self.clone.write_params(expanded(values))
        echo(f"trial {trial.number}: {', '.join(f'{key} {shown(value)}' for key, value in trial.params.items())}")
        trial.set_user_attr("experiment", name)
        ending, output = self._reproduce(trial, name)
        self.stop.check()
        if ending == "complete":
            metrics = json.loads((self.clone.folder / f"reports/{self.config.stage}/metrics.json").read_text("utf-8"))
            value = metrics.get(self.config.metric)
            if type(value) not in (int, float) or not math.isfinite(value):
                self._fail(trial, f"{self.config.objective} is {value!r}")
                return
            trial.set_user_attr("commit", self.clone.save_experiment(name, f"{name}: {self.config.objective} {value}"))
            self.study.optuna.tell(trial, float(value))
            best = best_of(self.study.counted(), self.config.direction)
            told = f"the best is {shown(best.value)} of trial {best.number}" if best else ""
            echo(f"trial {trial.number}: {self.config.objective} {shown(value)}; {told}")
        elif ending in ("pruned", "diverged"):
            trial.set_user_attr("ended", output)
            self._write_partial_reports()
            trial.set_user_attr("commit", self.clone.save_experiment(name, f"{name}: {output}"))
            self.study.optuna.tell(trial, state=TrialState.PRUNED)
            echo(f"trial {trial.number}: {output}")
        else:
            self._fail(trial, output)
            return
        self.failures = 0

    def _fail(self, trial: "Trial", reason: str) -> None:
        from optuna.trial import TrialState

        trial.set_user_attr("ended", reason)
        self.study.optuna.tell(trial, state=TrialState.FAIL)
        self.failures += 1
        log = self.logs / f"trial-{trial.number:03d}.log"
        warn(f"trial {trial.number} failed: {reason}; its log is {log}")
        if self.failures >= MAX_FAILURES:
            raise UserError(f"{MAX_FAILURES} trials failed in a row, the last one with: {reason}")

    def _reproduce(self, trial: "Trial", name: str) -> tuple[str, str]:
        """Runs the stages. Returns how they ended (complete, pruned, diverged, failed), and a sentence about it."""
        log = self.logs / f"trial-{trial.number:03d}.log"
        log.unlink(missing_ok=True)
        targets = [self.config.stage]
        if any(key.startswith(("corpus.", "tokenize.")) for key in expanded(trial.params)):
            targets.insert(0, "tokenize")  # the tokens decide where the history is
        deadline = time.monotonic() + BUSY_WAIT_S
        while targets:
            dvc = self._start(["dvc", "repro", targets[0]], log, name)
            watch = Watch(self.study, trial) if targets[0] != "tokenize" else None
            code = self._finish(dvc, watch)
            self.stop.check()
            if watch is not None and watch.is_pruned and code:
                return "pruned", f"pruned at step {watch.seen_step}, validation loss {shown(watch.last_loss)}"
            stage_code = _last_exit_code(log)
            if code and stage_code == BUSY and time.monotonic() < deadline:
                time.sleep(1)  # what a killed worker started is ending
            elif code:
                return "diverged" if stage_code == DIVERGED else "failed", error_of(log)
            else:
                targets.pop(0)
        return "complete", ""

    def _start(self, command: list[str], log: Path, name: str | None = None) -> "subprocess.Popen[bytes]":
        environment = {**self.clone.environment(name, self.parent_run), "PATH": self.path}
        environment.pop("DVC_ROOT", None)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            return subprocess.Popen(
                command,
                cwd=self.clone.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                preexec_fn=request_sigterm_with_parent,
            )

    def _finish(self, dvc: "subprocess.Popen[bytes]", watch: Watch | None = None) -> int:
        """Waits for DVC. Returns its exit code. Raises Interrupted, after the ordinary stop, if a signal arrives."""
        while dvc.poll() is None:
            if self.stop:
                stop_stages()
                with suppress(subprocess.TimeoutExpired):
                    dvc.wait(STOP_WAIT_S)
                dvc.terminate()
                dvc.wait()
                self.stop.check()
            if watch is not None:
                watch.look()
            time.sleep(POLL_S)
        if watch is not None:
            watch.look(final=True)
        return dvc.returncode

    def _write_partial_reports(self) -> None:
        """reports/train of a training that ended early, from its history. The pictures of the snapshot go."""
        from stages import reports

        folder = self.clone.folder / paths.TRAIN_REPORT
        shutil.rmtree(folder, ignore_errors=True)
        rows = read_history(check(load_params(paths.PARAMS)).folder)
        if not rows:
            return
        reports.write_history(rows, folder)
        write_json(folder / "metrics.json", partial_metrics(rows))


def _last_exit_code(log: Path) -> int | None:
    codes = EXIT_CODE.findall(log.read_text(encoding="utf-8", errors="replace"))
    return int(codes[-1]) if codes else None


def error_of(log: Path) -> str:
    """The last error in the log of a trial, without its marker."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.lower().startswith("error:")]
    ours = [line for line in errors if line.startswith("error:")]  # of a stage; DVC writes ERROR:
    return (ours or errors or lines or ["nothing was written"])[-1].partition(":")[2].strip()


def shown(value: Any) -> str:
    """A value in a few characters."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


@contextmanager
def preloaded(clone: Clone) -> Iterator[str]:
    """The path on which DVC finds `python`: with the program of `preload` first, where forks are safe."""
    path = os.environ["PATH"]
    if not hasattr(os, "pidfd_open") or may_use_gpu(load_params(paths.PARAMS).runtime):  # a GPU may not be forked
        yield path
        return
    folder = Path(tempfile.mkdtemp(prefix="gpt2-"))  # the path of a socket has at most 107 bytes
    client = write_client(folder / "bin", folder / "socket")
    command = [sys.executable, "-m", "experiments.sweeping.preload", str(folder / "socket"), str(client / "python")]
    server = subprocess.Popen(command, cwd=clone.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert server.stdout is not None
    try:
        if not server.stdout.readline():
            warn("the stages start without shared imports, slower")
        yield f"{client}{os.pathsep}{path}"
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(STOP_WAIT_S)
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Returns the exit code."""
    request_sigterm_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="the repository")
    parser.add_argument("--file", type=Path, required=True, help="sweep.yaml")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds since 1970")
    arguments = parser.parse_args()
    stop = StopSignal()
    try:
        folder = Path.cwd()
        config, base = load_sweep(arguments.file, paths.PARAMS)
        study = SweepStudy(arguments.root, config, base)
        definition = study.find()
        if definition is None:
            raise UserError(f"there is no study {config.name!r}")
        os.environ["DVC_ROOT"] = str(folder)  # tells `stages.paths` where we are
        clone = Clone(arguments.root, folder, definition["base"], definition["snapshot"])
        with preloaded(clone) as path:
            worker = Worker(study, clone, definition["mlflow_run_id"], stop)
            worker.path = path
            worker.run(arguments.deadline)
    except GPT2Error as error:
        if not isinstance(error, Interrupted):
            echo(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
