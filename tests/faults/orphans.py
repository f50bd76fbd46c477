"""DVC is killed, and leaves its stage behind."""

import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.faults.commands import PLAIN, TEST_TIMEOUT_S, THROUGH_DVC, Command, Trained
from tests.faults.result import Result


def orphaned_processes(
    folder: Path, trained: Trained, cases: int, seed: int = 0, within_s: float = TEST_TIMEOUT_S
) -> Result:
    """Kills only DVC: the stage must end by itself, and a second run must not write at the same time."""
    draw = random.Random(seed)
    project = trained.copy(folder / "orphaned")
    project.change(train={"max_steps": 4000, "eval_interval": 4000})
    result = Result("orphaned processes and double runs after DVC is killed")
    slowest_s = 0.0
    for number in range(cases):
        dvc = Command(project, THROUGH_DVC)
        if not (stage := wait_for_stage(dvc.process)):
            result.add("the stage did not start")
            continue
        time.sleep(draw.uniform(0, 5))
        dvc.process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM]))
        dvc.process.wait()
        killed_s = time.monotonic()
        second = Command(project, PLAIN)
        time.sleep(0.2)
        both = [p for p in (stage, psutil.Process(second.process.pid)) if p.is_running()]
        holders = {name for name in map(holder_of_lock, project.folder.glob("checkpoints/*/lock")) if name}
        problem = f"two runs hold a lock: {holders}" if len(holders) > 1 else None
        try:
            stage.wait(within_s)
            slowest_s = max(slowest_s, time.monotonic() - killed_s)
        except psutil.TimeoutExpired:
            problem = f"the stage was still running after {within_s} s"
            stage.kill()
        second.process.send_signal(signal.SIGTERM)
        code = second.wait()
        if code not in (75, 143):
            problem = second.problem(code, 143)
        result.add(problem and f"try {number} ({len(both)} at once): {problem}")
    result.notes.append(f"the slowest stage ended in {slowest_s:.1f} s")
    return result


def wait_for_stage(dvc: "subprocess.Popen[bytes]") -> psutil.Process | None:
    """Waits for the process of the stage that DVC starts."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and dvc.poll() is None:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(dvc.pid).children(recursive=True):
                if "stages.train" in " ".join(child.cmdline()):
                    return child
        time.sleep(0.05)
    return None


def holder_of_lock(path: Path) -> str:
    """The holder of a lock file; empty if it is free."""
    import fcntl

    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"{path.parent.name} by {file.read()}"
    return ""
