"""A small training run with the real loop, callbacks and checkpoints, each session of it in a forked process."""

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt2 import files
from gpt2.config import GPTConfig
from gpt2.data.sampler import Sampler
from gpt2.errors import GPT2Error
from gpt2.model.transformer import GPT
from gpt2.optimizers.optimizer import Optimizer
from gpt2.training.checkpoints import CheckpointStore
from gpt2.training.mixed_precision import MixedPrecisionModel
from gpt2.training.state import TrainState, restore_checkpoint
from gpt2.training.trainer import Trainer
from gpt2.training.validation import validation_loss
from stages.callbacks import StageCallbacks
from tests.conftest import TINY_TRAIN, NeverStops

CONFIG = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16)
TRAIN = replace(
    TINY_TRAIN, batch_size=2, sequence_length=8, max_steps=5, eval_interval=2, gradient_accumulation_steps=1
)
TOKENS = np.random.default_rng(0).integers(0, 64, 400).astype(np.uint16)
NUMBERS = ("step", "train_loss", "val_loss", "learning_rate", "grad_norm", "tokens")
"""The columns of the history that do not depend on the clock."""


class NoRun:
    """Tracking that does nothing."""

    run_id = "a" * 32

    def metrics(self, *_: Any) -> None:
        pass


class Session:
    """Continues a run from the newest checkpoint in a folder to its end."""

    def __init__(
        self, folder: Path, *, interval: int = 1, precision: torch.dtype = torch.float32, **changes: Any
    ) -> None:
        torch.manual_seed(1)
        self.config = replace(TRAIN, **changes)
        self.interval, self.warnings = interval, []
        self.store = CheckpointStore(folder)
        self.model = GPT(CONFIG)
        self.optimizer = Optimizer(self.model, self.config)
        self.compute = MixedPrecisionModel(self.model, precision)
        content = self.store.load_newest(self.warnings.append)
        if content is None:
            self.state = TrainState.initial(precision, self.config.batch_size)
        else:
            self.state = restore_checkpoint(content, self.model, self.optimizer)

    def train(self, stop: Any = None) -> bool:
        """Returns whether the run is complete."""
        callbacks = StageCallbacks(self.store, NoRun(), stop or NeverStops(), self.state, self.config.max_steps)
        callbacks.warn = self.warnings.append
        callbacks._print = lambda _: None

        def validate(batch_size: int, progress: Any) -> float:
            return validation_loss(
                self.compute, TOKENS[:60], sequence_length=8, batch_size=batch_size, progress=progress
            )

        try:
            return Trainer(
                self.compute,
                self.optimizer,
                Sampler(TOKENS, self.config),
                validate,
                self.config,
                self.state,
                callbacks,
                log_interval=1,
                checkpoint_interval=self.interval,
            ).train()
        finally:
            callbacks.close()

    def outcome(self) -> dict[str, Any]:
        """The results that must be bitwise identical in two runs."""
        digest = hashlib.sha256()
        for weights in (*self.model.parameters(), *self.state.best_weights.values()):
            digest.update(weights.detach().numpy().tobytes())
        return {
            "sha256": digest.hexdigest(),
            "best": [self.state.best_step, self.state.best_val_loss],
            "history": [[row[name] for name in NUMBERS] for row in self.state.history],
        }


def whole_run(folder: Path, disk: Any = None, **options: Any) -> Callable[[], int]:
    """A session as a function for `forked`. It writes its outcome to `folder`.json and returns the exit code."""

    def run() -> int:
        if disk is not None:
            files.os = disk
        try:
            session = Session(folder, **options)
            session.train()
        except GPT2Error as error:
            return error.exit_code
        files.os = os
        folder.with_suffix(".json").write_text(json.dumps(session.outcome()))
        return 0

    return run


def warm_up(folder: Path) -> None:
    """Runs a session before any fork, because torch's imports at first use take longer than a session."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    Session(folder).train()
    torch.set_num_threads(threads)


def outcome_of(folder: Path) -> Any:
    """The outcome that `whole_run` wrote."""
    return json.loads(folder.with_suffix(".json").read_text())


def forked(*functions: Callable[[], int]) -> list[int]:
    """Runs functions in forked processes at the same time. Returns their exit codes; 99 is a traceback."""
    pids = []
    for function in functions:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            code = 99
            terminal = os.dup(2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                torch.set_num_threads(1)
                code = function()
            except BaseException:
                os.write(terminal, traceback.format_exc().encode())
            finally:
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
