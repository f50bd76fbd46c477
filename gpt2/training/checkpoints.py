"""Checkpoints on the disk, and when to save one.

    checkpoints/<fingerprint>/step-000250/gpt_model_checkpoint.pt   weights, optimizer, training state
                                          manifest.json             SHA-256 of the file, written last

Several processes write their tensors beside it (`gpt2.distributed.checkpoints`).
`gpt2.files.write_folder` writes a checkpoint atomically. If a checkpoint is damaged, `load_newest` warns and loads an
older one. Each contains everything the run needs, including its best weights so far.
"""

import math
import pickle
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2.errors import DivergedError, FileError, one_line
from gpt2.files import delete_folder, verify_folder, write_folder
from gpt2.model.transformer import GPT
from gpt2.optimizers.optimizer import Optimizer
from gpt2.training.state import TrainState, checkpoint_content
from gpt2.world import ALONE, World, local_part

CHECKPOINT_FILE = "gpt_model_checkpoint.pt"
KEEP_NEWEST = 2
MIN_SAVE_INTERVAL_S = 60.0
SAVE_INTERVAL_IN_SAVES = 50
"""Interval in durations of a save: saving takes at most 2 % of the time."""
MAX_SAVE_FAILURES = 3
ADVICE = "Try a smaller train.learning_rate or a longer warm-up"


class CheckpointStore:
    """The checkpoints of one run, in one folder. Several processes load together, and only rank 0 deletes."""

    def __init__(self, folder: Path, world: World = ALONE) -> None:
        """Creates nothing before the first `save`."""
        self.folder, self.world = folder, world
        self._damaged: set[int] = set()

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in ascending order. `load` verifies it."""
        names = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, step: int, content: dict[str, Any], *, last: bool = False) -> Path:
        """Writes the checkpoint of a step; then deletes old checkpoints and leftovers. last: of a session.

        Keeps a valid checkpoint of the same step. Raises FileError if the checkpoint cannot be written; older
        checkpoints are kept then.
        """
        target = self.path(step)
        try:
            if target.exists():
                if self.is_valid(step):
                    return target
                delete_folder(target)
            write_folder(target, {CHECKPOINT_FILE: lambda file: torch.save(content, file)}, {"step": step})
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            self.prune()
            raise FileError(
                f"cannot write the checkpoint {target} ({one_line(error)}); free disk space, and run again to continue"
            ) from None
        self._damaged.discard(step)
        self.prune()
        return target

    def is_valid(self, step: int) -> bool:
        """Whether a step has a checkpoint that can be loaded."""
        try:
            self._verified(step, 0, 1)
        except FileError:
            return False
        return True

    def prune(self, keep: int = KEEP_NEWEST) -> None:
        """Deletes all checkpoints but the newest, and leftovers of interrupted saves. Ignores errors."""
        kept = {self.path(step) for step in [s for s in self.steps() if s not in self._damaged][-keep:]}
        for path in set(self.folder.glob("step-*")) - kept:
            with suppress(OSError):
                delete_folder(path)

    def load(self, step: int) -> dict[str, Any]:
        """The content of a checkpoint, on the CPU. Raises FileError if it is missing or damaged.

        Each of several processes verifies a part of the files.
        """
        content, failure = None, None
        try:
            content = self._verified(step, self.world.rank, self.world.size)
        except FileError as error:
            failure = str(error)
        for failed in self.world.gather(failure):
            if failed is not None:
                raise FileError(failed)
        assert content is not None
        return content

    def _verified(self, step: int, part: int, parts: int) -> dict[str, Any]:
        path = self.path(step)
        manifest = verify_folder(path, part, parts)
        if manifest.get("step") != step or CHECKPOINT_FILE not in manifest["sha256"]:
            raise FileError(f"{path} is damaged: its manifest is that of step {manifest.get('step')!r}")
        try:
            content: dict[str, Any] = torch.load(path / CHECKPOINT_FILE, map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise FileError(f"cannot read the checkpoint {path}: {one_line(error)}") from None
        if not isinstance(content, dict):
            raise FileError(f"cannot read the checkpoint {path}: it does not contain a dict")
        return content

    def load_newest(self, warn: Callable[[str], object] = warnings.warn) -> dict[str, Any] | None:
        """The newest valid checkpoint; None if there is no checkpoint. Warns about each damaged one.

        Raises FileError if all checkpoints are damaged.
        """
        steps = self.world.from_first(self.steps())
        for step in reversed(steps):
            try:
                return self.load(step)
            except FileError as error:
                self._damaged.add(step)
                warn(f"{error}; loading an older checkpoint")
        if steps:
            raise FileError(f"no valid checkpoint in {self.folder}; delete this folder to start a new run")
        return None


class CheckpointSaver:
    """Decides when a checkpoint is due, and never saves non-finite weights."""

    def __init__(
        self,
        model: GPT,
        optimizer: Optimizer,
        *,
        save: Callable[[int, dict[str, Any], bool], None],
        warn: Callable[[str], None],
        interval_steps: int | None,
        world: World = ALONE,
    ) -> None:
        """save: writes the content of a checkpoint, given its step, and whether it is the last of the session.

        interval_steps: None saves by time alone.
        """
        self.model, self.optimizer, self.interval_steps, self.world = model, optimizer, interval_steps, world
        self._save, self._warn = save, warn
        self._last_save_s = time.monotonic()
        self._save_duration_s = 0.0
        self._failures = 0
        self._saved_step = -1

    def is_due(self, step: int) -> bool:
        """By steps, or by time: after the longer of 60 s and 50 times the duration of the last save."""
        if self.interval_steps and step % self.interval_steps == 0:
            return True
        interval_s = max(MIN_SAVE_INTERVAL_S, SAVE_INTERVAL_IN_SAVES * self._save_duration_s)
        return self.world.any(time.monotonic() - self._last_save_s >= interval_s)

    def save(self, state: TrainState, *, last: bool = False) -> None:
        """Saves a checkpoint. If that fails, it warns and tries again when the next one is due.

        Raises FileError after three failures in a row, or if the last checkpoint of a session fails; DivergedError if
        weights or moments are not finite.
        """
        if state.step == self._saved_step and not (last and self.world.size > 1):  # then it may still be written
            return
        start_s = time.monotonic()
        self._require_finite(state.step)
        try:
            self._save(state.step, checkpoint_content(self.model, self.optimizer, state, self.world), last)
            self._failures, self._saved_step = 0, state.step
        except FileError as error:
            self._failures += 1
            if last or self._failures == MAX_SAVE_FAILURES:
                raise
            self._warn(f"{error}. Training continues without this checkpoint")
        self._last_save_s = time.monotonic()
        self._save_duration_s = self._last_save_s - start_s
        if not last:  # the last one cannot contain its own duration
            state.save_s += self._save_duration_s

    def _require_finite(self, step: int) -> None:
        tensors: list[Tensor] = [local_part(t) for t in (*self.model.parameters(), *self.optimizer.tensors())]
        tensors = [tensor for tensor in tensors if tensor.numel()]
        norms = torch.stack([norm.detach().float().cpu() for norm in torch._foreach_norm(tensors, ord=math.inf)])
        if self.world.any(not norms.isfinite().all()):
            raise DivergedError(
                f"training diverged: after step {step} weights or moments are not finite. {ADVICE}", step
            )
