"""What the training loop tells: to the terminal, the history, MLflow and the checkpoints."""

from typing import TYPE_CHECKING

from stages import tracking
from stages.params import Params
from stages.process import StopFlag, say

if TYPE_CHECKING:
    from gpt2.checkpoint import CheckpointStore
    from gpt2.model import GPT
    from gpt2.optim import Optimizer
    from gpt2.trainer import Row, TrainState


class StageHooks:
    """What the training loop tells us goes to the terminal, the history, MLflow and the checkpoints."""

    def __init__(
        self,
        params: Params,
        store: "CheckpointStore",
        run: tracking.Run,
        model: "GPT",
        optimizer: "Optimizer",
        stop: StopFlag,
        state: "TrainState",
    ) -> None:
        from tqdm import tqdm

        self.params, self.store, self.run, self.stop = params, store, run, stop
        self.model, self.optimizer = model, optimizer
        # disable=None: quiet when the output is no terminal
        self.bar = tqdm(total=params.train.max_steps, initial=state.step, unit="step", disable=None, dynamic_ncols=True)
        self.val_loss: float | None = None
        self.mfu: float | None = None

    def log(self, row: "Row") -> None:
        """A row of the history is mirrored to MLflow; an evaluation is a line for people."""
        step = int(row["step"] or 0)
        self.mfu = row["mfu"]
        self.run.metrics(
            step,
            {
                "train/loss": row["train_loss"],
                "val/loss": row["val_loss"],
                "train/lr": row["learning_rate"],
                "train/grad_norm": row["grad_norm"],
                "train/tokens_per_s": row["tokens_per_s"],
                "train/mfu": row["mfu"],
                "train/peak_memory_bytes": row["peak_memory_bytes"],
            },
        )
        if row["val_loss"] is not None:
            self.val_loss = row["val_loss"]
            line = (
                f"step {step:>6} of {self.params.train.max_steps}: training loss {row['train_loss']:.4f}, "
                f"validation loss {row['val_loss']:.4f}, {row['tokens_per_s']:,.0f} tokens/s, "
                f"{(row['peak_memory_bytes'] or 0) / 1e9:.1f} GB"
            )
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
        """Writes a checkpoint, and keeps the best one."""
        from gpt2.trainer import checkpoint_content

        content = checkpoint_content(self.model, self.optimizer, state)
        self.store.save(state.step, {**content, "mlflow_run_id": self.run.id}, keep=[state.best_step])

    def should_stop(self) -> bool:
        """Whether a signal came."""
        return bool(self.stop)

    def close(self) -> None:
        """Ends the progress bar."""
        self.bar.close()
