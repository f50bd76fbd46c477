"""What the train stage does with the events of the training loop: terminal, history file, MLflow, checkpoints."""

from typing import TYPE_CHECKING, Any

from gpt2.files import JsonLines
from stages import tracking
from stages.process import StopSignal, echo, warn

if TYPE_CHECKING:
    from gpt2.distributed.checkpoints import ShardedWriter
    from gpt2.training.checkpoints import CheckpointStore
    from gpt2.training.state import LogRow, TrainState

HISTORY_FILE = "history.jsonl"
METRICS = {
    "train/loss": "train_loss",
    "val/loss": "val_loss",
    "train/lr": "learning_rate",
    "train/grad_norm": "grad_norm",
    "train/tokens_per_s": "tokens_per_s",
    "train/mfu": "mfu",
    "train/peak_memory_bytes": "peak_memory_bytes",
}
"""Metric names in MLflow, and their columns in the history."""


def metrics_of(row: "LogRow") -> dict[str, float | None]:
    """A row of the history as MLflow metrics."""
    return {metric: row[column] for metric, column in METRICS.items()}


class StageCallbacks:
    """Implements `gpt2.training.trainer.Callbacks` for a pipeline run."""

    def __init__(
        self,
        store: "CheckpointStore",
        run: tracking.Run,
        stop: StopSignal,
        state: "TrainState",
        max_steps: int,
        writer: "CheckpointStore | ShardedWriter | None" = None,
    ) -> None:
        """writer: saves the checkpoints of `store`; None: the store itself."""
        from tqdm import tqdm

        self.store, self.writer = store, writer or store
        self.run, self.stop, self.max_steps = run, stop, max_steps
        self.history: JsonLines | None = None
        try:
            self.history = JsonLines(store.folder / HISTORY_FILE, state.history)
        except OSError as error:
            self._disable_history(error)
        # disable=None: no bar when the output is not a terminal
        self.bar = tqdm(total=max_steps, initial=state.step, unit="step", disable=None, dynamic_ncols=True)
        self.val_loss: float | None = None
        self.mfu: float | None = None

    def _disable_history(self, error: OSError) -> None:
        """Checkpoints hold the history too, and the final report is made from those."""
        self.history = None
        warn(f"cannot write {self.store.folder / HISTORY_FILE} ({error}); training continues without that file")

    def log(self, row: "LogRow") -> None:
        """Appends a row to the history and to MLflow; prints a line for an evaluation."""
        step = int(row["step"] or 0)
        self.mfu = row["mfu"]
        if self.history is not None:
            try:
                self.history.append(row)
            except OSError as error:
                self._disable_history(error)
        self.run.metrics(step, metrics_of(row))
        if row["val_loss"] is not None:
            self.val_loss = row["val_loss"]
            self._print(
                f"step {step:>6} of {self.max_steps}: training loss {row['train_loss']:.4f}, "
                f"validation loss {row['val_loss']:.4f}, {row['tokens_per_s']:,.0f} tokens/s, "
                f"{(row['peak_memory_bytes'] or 0) / 1e9:.1f} GB"
            )

    def _print(self, line: str) -> None:
        if self.bar.disable:
            echo(line)
        else:
            self.bar.write(line)

    def progress(self, state: "TrainState", loss: float, tokens_per_s: float) -> None:
        """Advances the progress bar, which shows the ETA."""
        shown = {"loss": f"{loss:.3f}", "tokens/s": f"{tokens_per_s:,.0f}"}
        if self.mfu is not None:
            shown["MFU"] = f"{self.mfu:.0%}"
        if self.val_loss is not None:
            shown["val"] = f"{self.val_loss:.3f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def stopped_early(self, state: "TrainState") -> None:
        """Ends the progress bar at this step, and says why."""
        self.bar.total = state.step
        self._print(
            f"stopped early, after step {state.step} of {self.max_steps}: the validation loss has not improved since "
            f"step {state.best_step} (train.patience)"
        )

    def save(self, step: int, content: dict[str, Any], last: bool) -> None:
        """Saves a checkpoint."""
        self.writer.save(step, {**content, "run_id": self.run.run_id}, last=last)

    def warn(self, message: str) -> None:
        """Prints a warning above the progress bar."""
        self._print(f"WARNING: {message}")

    def should_stop(self) -> bool:
        """Whether a signal arrived."""
        return bool(self.stop)

    def close(self) -> None:
        """Ends the progress bar and closes the history file."""
        self.bar.close()
        if self.history is not None:
            self.history.close()


class SilentCallbacks:
    """The callbacks of all processes but rank 0: they only save their part of checkpoints, and stop."""

    def __init__(self, writer: "CheckpointStore | ShardedWriter", stop: StopSignal, run_id: str) -> None:
        self.writer, self.stop, self.run_id = writer, stop, run_id

    def log(self, row: "LogRow") -> None:
        """Rank 0 logs."""

    def progress(self, state: "TrainState", loss: float, tokens_per_s: float) -> None:
        """Rank 0 shows it."""

    def stopped_early(self, state: "TrainState") -> None:
        """Rank 0 says it."""

    def save(self, step: int, content: dict[str, Any], last: bool) -> None:
        """Saves this process's part of a checkpoint."""
        self.writer.save(step, {**content, "run_id": self.run_id}, last=last)

    def warn(self, message: str) -> None:
        """Rank 0 warns."""

    def should_stop(self) -> bool:
        """Whether a signal arrived."""
        return bool(self.stop)

    def close(self) -> None:
        """Nothing is open."""
