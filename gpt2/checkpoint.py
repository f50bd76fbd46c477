"""Weights on the disk: a model folder, and the checkpoints of a run that it can go on from.

    checkpoints/<fingerprint>/step-000250/gpt_model_checkpoint.pt   weights, optimizer, and where the run was
                                          manifest.json             SHA-256 of the file, written last

A checkpoint is published as `gpt2.files` says: it is there whole or not at all. What is damaged later is recognised,
named, and passed over for an older one. Each holds all that a run needs, its best weights so far among it.
"""

import json
import pickle
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.errors import FileError
from gpt2.files import check_published, discard, publish, write_with
from gpt2.model import GPT

CHECKPOINT_FILE = "gpt_model_checkpoint.pt"
MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
RUN_FILE = "run.json"
KEEP_NEWEST = 2


def save_weights(state_dict: dict[str, Tensor], path: Path) -> None:
    """Writes weights as safetensors; the head, which is the embedding, is left out."""
    weights = {name: w.detach().cpu().contiguous() for name, w in state_dict.items() if name != "lm_head.weight"}
    write_with(path, lambda temporary: save_file(weights, temporary, metadata={"format": "pt"}))


def load_model(folder: Path) -> GPT:
    """The model in a folder with model.safetensors and config.json, in evaluation mode on the CPU.

    Raises FileError if they cannot be read or do not fit each other.
    """
    try:
        sizes = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        weights = load_file(folder / MODEL_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise FileError(f"no model can be loaded from {folder} ({error}); train one with `dvc repro`") from None
    model = GPT(GPTConfig.from_dict(sizes))
    weights["lm_head.weight"] = weights.get("transformer.wte.weight", torch.empty(0))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise FileError(f"the weights in {folder} do not fit its {CONFIG_FILE}: {_one_line(error)}") from None
    return model.eval()


def trained_length(folder: Path) -> int | None:
    """Length of the sequences that the model in a folder was trained on, which may be less than its context.

    None if its run.json does not say. What a model does at positions that it was never trained on is noise.
    """
    try:
        length = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["sequence_length"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return length if isinstance(length, int) and length > 0 else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class CheckpointStore:
    """The checkpoints of one run, in one folder."""

    def __init__(self, folder: Path) -> None:
        """Nothing is made before the first `save`."""
        self.folder = folder
        self._unsound: set[int] = set()

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order; whether it is sound shows when it is loaded."""
        names = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, step: int, content: dict[str, Any]) -> Path:
        """Writes the checkpoint of a step; then deletes all but the newest, and leftovers.

        One that is there already and sound is left as it is. Raises FileError if the checkpoint cannot be written;
        older ones are untouched then.
        """
        target = self.path(step)
        try:
            if target.exists():
                if self._is_sound(step):
                    return target
                discard(target)
            publish(target, {CHECKPOINT_FILE: lambda file: torch.save(content, file)}, {"step": step})
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            self.prune()
            raise FileError(
                f"cannot write the checkpoint {target} ({_one_line(error)}); make room, and run again to go on"
            ) from None
        self._unsound.discard(step)
        self.prune()
        return target

    def _is_sound(self, step: int) -> bool:
        try:
            self.load(step)
        except FileError:
            return False
        return True

    def prune(self, keep: int = KEEP_NEWEST) -> None:
        """Deletes all checkpoints but the newest, and what interrupted saves left. What cannot be deleted stays."""
        kept = {self.path(step) for step in [s for s in self.steps() if s not in self._unsound][-keep:]}
        for path in set(self.folder.glob("step-*")) - kept:
            with suppress(OSError):
                discard(path)

    def load(self, step: int) -> dict[str, Any]:
        """The content of a checkpoint, on the CPU. Raises FileError if it is missing or not sound."""
        path = self.path(step)
        manifest = check_published(path)
        if manifest.get("step") != step or list(manifest["sha256"]) != [CHECKPOINT_FILE]:
            raise FileError(f"{path} is mixed up: its manifest is that of {manifest.get('step')!r}")
        try:
            content: dict[str, Any] = torch.load(path / CHECKPOINT_FILE, map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise FileError(f"cannot read the checkpoint {path}: {_one_line(error)}") from None
        if not isinstance(content, dict):
            raise FileError(f"cannot read the checkpoint {path}: it holds no dict")
        return content

    def load_newest(self, warn: Callable[[str], object] = warnings.warn) -> dict[str, Any] | None:
        """The newest sound checkpoint, None if there never was one; `warn` hears of each that is passed over.

        Raises FileError if there are checkpoints and none is sound.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.load(step)
            except FileError as error:
                self._unsound.add(step)
                warn(f"{error}; going back to an older checkpoint")
        if steps:
            raise FileError(f"no checkpoint in {self.folder} is sound; delete that folder to start anew")
        return None
