"""Faults of one of several processes of the train stage, or of the stage that starts them."""

import os
import random
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.faults.commands import PLAIN, QUICK, SHIM, Command, Trained, finish, forget, results
from tests.faults.result import Result
from tests.project import Project

GRACE_S = 2.0
"""For processes that end by themselves when the stage has ended."""
LAST_STEPS = QUICK["max_steps"] - 3
"""A signal after so many steps may come when nothing is left to stop."""


def training_in(folder: Path, strategy: str) -> Trained:
    """A project that trains in two processes."""
    return Trained(folder, processes=2, strategy=strategy)


def workers_of(command: Command) -> list[psutil.Process]:
    """The workers of a running stage, by rank."""
    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(command.process.pid).children():
            with suppress(psutil.Error):
                rank = child.environ().get("RANK")
                if rank is not None and "stages.train" in child.cmdline():
                    found.append((int(rank), child))
    return [child for _, child in sorted(found, key=lambda pair: pair[0])]


def wait_for_step(project: Project, step: int, command: Command) -> None:
    """Waits until a run has logged a step, or has ended."""
    while command.process.poll() is None and logged_steps(project) < step:
        time.sleep(0.02)


def logged_steps(project: Project) -> int:
    """The number of steps that a run has logged."""
    histories = project.folder.glob("checkpoints/*/history.jsonl")
    return max((history.read_bytes().count(b"\n") for history in histories), default=0)


def survivors(processes: list[psutil.Process]) -> list[int]:
    """The processes that still run, though the stage has ended."""
    _, alive = psutil.wait_procs(processes, timeout=GRACE_S)
    return [process.pid for process in alive]


def killed_workers(folder: Path, trained: Trained, cases: int, seed: int = 0) -> Result:
    """SIGKILL of a random rank at a random step. The command goes on by itself, to the same bits."""
    result = Result(f"SIGKILL of one of two processes, {trained.strategy}")
    draw = random.Random(seed)
    project = trained.copy(folder / "killed")
    for _ in range(cases):
        forget(project)
        command = Command(project, PLAIN)
        step, rank = draw.randrange(1, 28), draw.randrange(2)
        wait_for_step(project, step, command)
        workers = workers_of(command)
        if len(workers) == 2:
            workers[rank].kill()
        problem = command.problem(command.wait(), 0)
        if problem is None and results(project) != trained.expected:
            problem = "another result"
        result.add(problem and f"rank {rank} at step {step}: {problem}")
    return result


def stopped_workers(folder: Path, trained: Trained, cases: int, seed: int = 0, within_s: float = 30.0) -> Result:
    """SIGTERM to the stage, to one process, or to all, at a random time: one checkpoint, the exit code, nobody left."""
    result = Result("SIGTERM to several processes")
    draw = random.Random(seed)
    project = trained.copy(folder / "stopped")
    late = 0
    while result.cases < cases:
        case = result.cases
        if case % 3 == 0:
            forget(project)
        command = Command(project, PLAIN)
        wait_for_step(project, draw.randrange(1, 6) + 6 * (case % 3), command)
        stage, workers = psutil.Process(command.process.pid), workers_of(command)
        targets = [[stage], workers[-1:], [stage, *workers]][case % 3]
        for target in targets:
            with suppress(psutil.NoSuchProcess):
                target.send_signal(signal.SIGTERM)
        is_late = not targets or logged_steps(project) >= LAST_STEPS
        sent_s = time.monotonic()
        code = command.wait()
        if code == 0 and is_late and late < cases:  # a busy machine: the run was over before the signal came
            late += 1
            forget(project)
            continue
        left = survivors(workers)
        seconds = time.monotonic() - sent_s
        problem = command.problem(code, 143)
        lines = re.findall(r"^error: .*", command.output(), re.MULTILINE)
        if problem is None and len(lines) != 1:
            problem = f"{len(lines)} errors: {lines}"
        if left:
            problem = f"left: {left}"
        if seconds > within_s:
            problem = f"took {seconds:.1f} s to end"
        result.notes.append(f"ended in {seconds:.1f} s")
        if problem is None and case % 3 == 2:
            problem = finish(project, PLAIN) or (None if results(project) == trained.expected else "another result")
        result.add(problem and f"{('stage', 'one process', 'all')[case % 3]}: {problem}")
    return result


def fault_of_one_process(project: Project, kind: str, call: str, rank: int = 1, **environment: str) -> tuple[int, str]:
    """Runs training with a fault in one rank. Returns exit code and output."""
    forget(project)
    sent = project.folder / "sent"
    sent.unlink(missing_ok=True)
    variables: dict[str, Any] = {"FAULT": call, "FAULT_KIND": kind, "FAULT_RANK": str(rank), "FAULT_SENT": str(sent)}
    command = Command(
        project, PLAIN, PYTHONPATH=str(SHIM), TORCH_ELASTIC_SHUTDOWN_TIMEOUT="2", **variables, **environment
    )
    code = command.wait()
    assert sent.exists(), command.output()
    os.unlink(sent)
    return code, command.output()
