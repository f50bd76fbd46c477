"""What the training loop tells: to the terminal, the history, MLflow and the checkpoints."""

from typing import TYPE_CHECKING

from gpt2.files import Lines
from stages import tracking
from stages.params import Params
from stages.process import Stop, say, warn

if TYPE_CHECKING:
    from gpt2.checkpoint import CheckpointStore
    from gpt2.model import GPT
    from gpt2.optim import Optimizer
    from gpt2.trainer import Row, TrainState

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
"""The metrics in MLflow, and their columns in the history."""


def metrics_of(row: "Row") -> dict[str, float | None]:
    """A row of the history as MLflow's metrics."""
    return {metric: row[column] for metric, column in METRICS.items()}


class StageHooks:
    """What the training loop tells us goes to the terminal, the history, MLflow and the checkpoints."""

    def __init__(
        self,
        params: Params,
        store: "CheckpointStore",
        run: tracking.Run,
        model: "GPT",
        optimizer: "Optimizer",
        stop: Stop,
        state: "TrainState",
    ) -> None:
        from tqdm import tqdm

        self.params, self.store, self.run, self.stop = params, store, run, stop
        self.model, self.optimizer = model, optimizer
        self.history: Lines | None = None
        try:
            self.history = Lines(store.folder / HISTORY_FILE, state.history)
        except OSError as error:
            self._go_on_without_history(error)
        # disable=None: quiet when the output is no terminal
        self.bar = tqdm(total=params.train.max_steps, initial=state.step, unit="step", disable=None, dynamic_ncols=True)
        self.val_loss: float | None = None
        self.mfu: float | None = None

    def _go_on_without_history(self, error: OSError) -> None:
        """The checkpoints hold it too, and what is written at the end is made of that."""
        self.history = None
        warn(f"cannot write {self.store.folder / HISTORY_FILE} ({error}); training goes on without that file")

    def log(self, row: "Row") -> None:
        """A row of the history goes to its file, and to MLflow; an evaluation is a line for people."""
        step = int(row["step"] or 0)
        self.mfu = row["mfu"]
        if self.history is not None:
            try:
                self.history.append(row)
            except OSError as error:
                self._go_on_without_history(error)
        self.run.metrics(step, metrics_of(row))
        if row["val_loss"] is not None:
            self.val_loss = row["val_loss"]
            self._say(
                f"step {step:>6} of {self.params.train.max_steps}: training loss {row['train_loss']:.4f}, "
                f"validation loss {row['val_loss']:.4f}, {row['tokens_per_s']:,.0f} tokens/s, "
                f"{(row['peak_memory_bytes'] or 0) / 1e9:.1f} GB"
            )

    def _say(self, line: str) -> None:
        if self.bar.disable:
            say(line)
        else:
            self.bar.write(line)

    def progress(self, state: "TrainState", loss: float, tokens_per_s: float) -> None:
        """A step of the progress bar, which shows the ETA itself."""
        shown = {"loss": f"{loss:.3f}", "tokens/s": f"{tokens_per_s:,.0f}"}
        if self.mfu is not None:
            shown["MFU"] = f"{self.mfu:.0%}"
        if self.val_loss is not None:
            shown["val"] = f"{self.val_loss:.3f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def save(self, state: "TrainState") -> None:
        """Writes a checkpoint."""
        from gpt2.trainer import checkpoint_content

        content = checkpoint_content(self.model, self.optimizer, state)
        self.store.save(state.step, {**content, "run_id": self.run.run_id})

    def warn(self, message: str) -> None:
        """A line that should not be overlooked."""
        self._say(f"WARNING: {message}")

    def should_stop(self) -> bool:
        """Whether a signal came."""
        return bool(self.stop)

    def close(self) -> None:
        """Ends the progress bar and the history's file."""
        self.bar.close()
        if self.history is not None:
            self.history.close()
