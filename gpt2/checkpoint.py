"""Weights on the disk: a model folder, and the checkpoints of a run that it can go on from.

    checkpoints/<fingerprint>/step-000250/gpt_model_checkpoint.pt   weights, optimizer, and where the run was
                                          manifest.json             SHA-256 of the file, written last

A checkpoint is made in a folder with a temporary name and renamed when it is whole. One without a manifest, or whose
file does not have the manifest's SHA-256, is passed over.
"""

import hashlib
import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.errors import FileError
from gpt2.files import TEMPORARY, sha256_of, sync_folder, write_json, write_with
from gpt2.model import GPT

CHECKPOINT_FILE = "gpt_model_checkpoint.pt"
MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
RUN_FILE = "run.json"
KEEP_NEWEST = 2


def fingerprint(facts: dict[str, Any], sources: Iterable[Path]) -> str:
    """A name for all that decides a run's numbers: facts (params, sums of the data) and source files."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for path in sorted(sources):
        digest.update(f"\0{path.as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


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

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order; whether it is sound shows when it is loaded."""
        names = (path.name for path in self.folder.glob("step-*") if (path / MANIFEST_FILE).is_file())
        return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit())

    def save(self, step: int, content: dict[str, Any], *, keep: Iterable[int] = ()) -> Path:
        """Writes a checkpoint; then deletes all but the newest, those of the steps `keep`, and leftovers.

        Raises FileError if it cannot be written; older ones are untouched then.
        """
        target = self.path(step)
        staging = target.with_name(target.name + TEMPORARY)
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            write_with(staging / CHECKPOINT_FILE, lambda temporary: torch.save(content, temporary))
            manifest = {"step": step, "sha256": {CHECKPOINT_FILE: sha256_of(staging / CHECKPOINT_FILE)}}
            write_json(staging / MANIFEST_FILE, manifest)
            if target.exists():  # not sound, or the run would have gone on from it
                self._delete(target)
            staging.rename(target)
            sync_folder(self.folder)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            shutil.rmtree(staging, ignore_errors=True)
            raise FileError(
                f"cannot write the checkpoint {target} ({_one_line(error)}); make room, and run again to go on"
            ) from None
        self.prune([*self.steps()[-KEEP_NEWEST:], *keep])
        return target

    def prune(self, keep: Iterable[int]) -> None:
        """Deletes the checkpoints of all steps but these."""
        for step in set(self.steps()) - set(keep):
            self._delete(self.path(step))

    def _delete(self, path: Path) -> None:
        (path / MANIFEST_FILE).unlink(missing_ok=True)  # from here on it is no checkpoint
        shutil.rmtree(path, ignore_errors=True)

    def load(self, step: int) -> dict[str, Any]:
        """The content of a checkpoint, on the CPU. Raises FileError if it is missing or not sound."""
        path = self.path(step)
        try:
            manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
            if sha256_of(path / CHECKPOINT_FILE) != manifest["sha256"][CHECKPOINT_FILE]:
                raise FileError(f"{path / CHECKPOINT_FILE} is damaged: its SHA-256 is not the manifest's")
            content: dict[str, Any] = torch.load(path / CHECKPOINT_FILE, map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            raise FileError(f"cannot read the checkpoint {path}: {_one_line(error)}") from None
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
                warn(f"{error}; going back to an older checkpoint")
        if steps:
            raise FileError(f"no checkpoint in {self.folder} is sound; delete that folder to start anew")
        return None
