"""What a worker sees of a training that runs: its history, which Optuna's pruner judges, and how it is stopped."""

import math
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from experiments.sweeping.study import SweepStudy
from gpt2.errors import GPT2Error
from gpt2.files import read_json_lines
from stages import paths
from stages.callbacks import HISTORY_FILE
from stages.params import load_params
from stages.train import check

if TYPE_CHECKING:
    from optuna.trial import Trial

ALIVE_S = 15.0


class Watch:
    """Follows the history of a training, reports its validation loss to Optuna, and prunes."""

    def __init__(self, study: SweepStudy, trial: "Trial") -> None:
        self.study, self.trial = study, trial
        self.folder: Path | None = None
        self.seen_step = -1
        self.is_pruned = False
        self.last_loss = math.nan
        self.alive_at = time.monotonic()

    def look(self, final: bool = False) -> None:
        """Reads new rows. final: the training has ended, nothing is pruned any more.

        A training that is told to stop may still evaluate before it does; the final look reports that, too.
        """
        if time.monotonic() - self.alive_at > ALIVE_S:
            self.study.show_alive(self.trial)
            self.alive_at = time.monotonic()
        if self.folder is None:
            try:
                self.folder = check(load_params(paths.PARAMS)).folder
            except GPT2Error:  # the stage says what is wrong
                return
        if self.is_pruned and not final:
            return
        for row in read_history(self.folder):
            step, loss = int(row["step"]), row.get("val_loss")
            if loss is None or step <= self.seen_step:
                continue
            self.seen_step, self.last_loss = step, float(loss)
            self.trial.report(float(loss), step)
            if not final and self.trial.should_prune() and stop_stage(self.folder):
                self.is_pruned = True
                return


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows that a training wrote so far."""
    path = folder / HISTORY_FILE
    return read_json_lines(path)[0] if path.is_file() else []


def partial_metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """reports/train/metrics.json of a training that ended early, as far as its history tells."""
    evaluated = [row for row in rows if row["val_loss"] is not None]
    best = min(evaluated, key=lambda row: row["val_loss"], default=None)
    last = rows[-1]
    return {
        "best_val_loss": best and best["val_loss"],
        "best_step": best["step"] if best else 0,
        "last_val_loss": evaluated[-1]["val_loss"] if evaluated else None,
        "last_train_loss": last["train_loss"],
        "steps": last["step"],
        "tokens": last["tokens"],
        "tokens_per_s": round(last["tokens"] / last["elapsed_s"]) if last.get("elapsed_s") else None,
        "elapsed_s": round(last.get("elapsed_s") or 0.0, 1),
        "mfu": last.get("mfu"),
        "peak_memory_bytes": last.get("peak_memory_bytes"),
    }


def stop_stage(folder: Path) -> bool:
    """Sends the ordinary stop to the training that holds a folder of checkpoints, if this worker started it."""
    try:
        pid = int(re.match(r"process (\d+) ", (folder / "lock").read_text()).group(1))  # type: ignore[union-attr]
    except (OSError, AttributeError):
        return False
    for process in psutil.Process().children(recursive=True):
        if process.pid == pid:
            process.send_signal(signal.SIGTERM)
            return True
    return False


def stop_stages() -> None:
    """Sends the ordinary stop to all stages that this worker started."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if "DVC_STAGE" in process.environ() and " -m stages." in command and "stages.sync" not in command:
                process.send_signal(signal.SIGTERM)
