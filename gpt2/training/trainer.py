"""The training loop. All dependencies are arguments; it accesses no files, trackers or signals itself."""

import math
from collections.abc import Callable
from typing import Any, Protocol

from gpt2.config import TrainConfig
from gpt2.data.loader import BatchLoader
from gpt2.data.sampler import Sampler
from gpt2.device import peak_memory_bytes
from gpt2.errors import DivergedError
from gpt2.optimizers.optimizer import Optimizer
from gpt2.optimizers.schedule import learning_rate_at
from gpt2.progress import ProgressCallback
from gpt2.training.accumulation import GradientAccumulator
from gpt2.training.checkpoints import ADVICE, CheckpointSaver
from gpt2.training.mixed_precision import MixedPrecisionModel, back_off_loss_scale, grow_loss_scale
from gpt2.training.state import LogRow, ThroughputMeter, TrainState
from gpt2.world import ALONE, World


class Callbacks(Protocol):
    """Callbacks of the training loop."""

    def log(self, row: LogRow) -> None:
        """A row of the history: step, train_loss, val_loss (None if not evaluated), learning_rate, grad_norm, ..."""

    def progress(self, state: TrainState, loss: float, tokens_per_s: float) -> None:
        """Called after each step."""

    def save(self, step: int, content: dict[str, Any], last: bool) -> None:
        """Saves a checkpoint (`gpt2.training.state.checkpoint_content`). Raises FileError if that is not possible.

        last: of the session; has to be on the disk when this returns.
        """

    def warn(self, message: str) -> None:
        """Shows a warning to the user."""

    def should_stop(self) -> bool:
        """Whether to interrupt the run; called between micro-batches, steps and validation batches."""


class _Stopped(Exception):  # noqa: N818 - not an error
    """`Callbacks.should_stop` returned True, between two steps or during an evaluation."""


class Trainer:
    """Trains a model from `state`, which it updates, to the last step."""

    def __init__(
        self,
        model: MixedPrecisionModel,
        optimizer: Optimizer,
        sampler: Sampler,
        validate: Callable[[int, ProgressCallback], float],
        config: TrainConfig,
        state: TrainState,
        callbacks: Callbacks,
        *,
        log_interval: int,
        checkpoint_interval: int | None = None,
        peak_flops: float | None = None,
        world: World = ALONE,
        score_training_text: Callable[[int, ProgressCallback], float] | None = None,
    ) -> None:
        """validate: returns the validation loss, given a micro-batch size and a callback to call after each batch.

        score_training_text: the same for a sample of the training text, once, after the last step.
        log_interval: in steps. checkpoint_interval: in steps, in addition to checkpoints by time; None is by time
        alone. peak_flops: of all processes, to log the model FLOPs utilization (MFU). world: the processes that train.
        """
        self.model, self.optimizer, self.validate = model, optimizer, validate
        self.config, self.state, self.callbacks = config, state, callbacks
        self.log_interval, self.peak_flops, self.world = log_interval, peak_flops, world
        self.score_training_text = score_training_text
        self.loader = BatchLoader(sampler, state.step, config.max_steps, model.device)
        self.gradients = GradientAccumulator(
            model,
            self.loader,
            config.share(world.size),
            state,
            warn=callbacks.warn,
            check_stop=self._check_stop,
            rank=world.rank,
        )
        self.saver = CheckpointSaver(
            model.master,
            optimizer,
            save=callbacks.save,
            warn=callbacks.warn,
            interval_steps=checkpoint_interval,
            world=world,
        )
        self.meter = ThroughputMeter(config.tokens_per_step)

    def train(self) -> bool:
        """Trains until `max_steps`, early stopping, or `callbacks.should_stop()`. Returns whether the run is complete.

        A checkpoint is saved in either case. Raises DivergedError before a non-finite loss or gradient reaches the
        weights, or non-finite weights reach a checkpoint; OutOfMemoryError if not even one sequence fits;
        FileError if checkpoints cannot be written.
        """
        state, config = self.state, self.config
        self.model.cast_weights()
        try:
            while not state.is_complete(config):
                if state.pending_row is None:
                    self.train_step()
                if state.pending_row is not None:
                    self.evaluate_and_log(state.pending_row)
                is_last = state.is_complete(config)
                if is_last or self.saver.is_due(state.step):
                    self.saver.save(state, last=is_last)
                    self.meter.restart()
                if not is_last:
                    self._check_stop()
        except _Stopped:
            self.optimizer.zero_grad()
            self.saver.save(state, last=True)
            return False
        finally:
            self.loader.close()
        return True

    def train_step(self) -> None:
        """One optimizer step: accumulate gradients, clip, update. Leaves a pending row if this step is logged."""
        config, state = self.config, self.state
        learning_rate = learning_rate_at(state.step, config)
        self.optimizer.set_learning_rate(learning_rate)
        loss = self.gradients.accumulate()
        grad_norm = self.model.clip_grad_norm(config.max_grad_norm)
        # the only synchronization with the device in a step
        train_loss, norm = self.world.mean(loss.item()), grad_norm.item()
        if math.isfinite(train_loss) and math.isfinite(norm):
            self.optimizer.step()
            self.model.cast_weights()
            grow_loss_scale(state)
        elif not (math.isfinite(train_loss) and back_off_loss_scale(state)):
            raise DivergedError(
                f"training diverged at step {state.step + 1}: loss {train_loss}, gradient norm {norm}; the weights are "
                f"those after step {state.step}. {ADVICE}",
                state.step,
            )
        self.optimizer.zero_grad()
        state.step += 1
        state.elapsed_s += self.meter.step()
        with state.timed("log_s"):
            self.callbacks.progress(state, train_loss, self.meter.tokens_per_s)
        if self._is_evaluated(state.step) or state.step % self.log_interval == 0:
            state.pending_row = self._row(train_loss, learning_rate, norm)

    def evaluate_and_log(self, row: LogRow) -> None:
        """Completes the row of a step, with the validation loss if it is due, and logs it."""
        state, val_loss = self.state, None
        if self._is_evaluated(state.step):
            val_loss = self.validate(state.micro_batch_size, lambda _: self._check_stop())
            if val_loss < state.best_val_loss:  # False for NaN
                state.best_val_loss, state.best_step = val_loss, state.step
                state.best_weights = self.model.copy_weights()
            if self.score_training_text is not None and state.is_last_step(self.config):
                loss = self.score_training_text(state.micro_batch_size, lambda _: self._check_stop())
                state.train_sample_loss = loss if math.isfinite(loss) else None
            state.elapsed_s += self.meter.restart()
        row = {
            **row,
            "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,
            "peak_memory_bytes": peak_memory_bytes(self.model.device),
            "elapsed_s": state.elapsed_s,
        }
        state.history.append(row)
        state.pending_row = None
        with state.timed("log_s"):
            self.callbacks.log(row)

    def _row(self, train_loss: float, learning_rate: float, grad_norm: float) -> LogRow:
        config = self.config
        flops_per_token = self.model.config.flops_per_token(config.sequence_length, config.freeze_layers)
        flops = self.meter.tokens_per_s * flops_per_token
        return {
            "step": self.state.step,
            "train_loss": train_loss,
            "val_loss": None,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "tokens_per_s": self.meter.tokens_per_s,
            "mfu": flops / self.peak_flops if self.peak_flops else None,
            "tokens": self.state.step * config.tokens_per_step,
        }

    def _is_evaluated(self, step: int) -> bool:
        return step == self.config.max_steps or step % self.config.eval_interval == 0

    def _check_stop(self) -> None:
        if self.world.any(self.callbacks.should_stop()):
            raise _Stopped
