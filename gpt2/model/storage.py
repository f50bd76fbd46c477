"""Model folders: model.safetensors and config.json, as the train stage writes them."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2.config import PRESETS, GPTConfig
from gpt2.errors import FileError, one_line
from gpt2.files import atomic_save
from gpt2.model.hugging_face import from_pretrained
from gpt2.model.transformer import GPT

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
RUN_FILE = "run.json"


def save_weights(state_dict: dict[str, Tensor], path: Path) -> None:
    """Writes weights as safetensors, without the head, which is tied to the embedding.

    Raises FileError if they cannot be written: safetensors reports a full disk with an error of its own.
    """
    weights = {name: w.detach().cpu().contiguous() for name, w in state_dict.items() if name != "lm_head.weight"}
    try:
        atomic_save(path, lambda temporary: save_file(weights, temporary, metadata={"format": "pt"}))
    except SafetensorError as error:
        raise FileError(f"cannot write {path} ({one_line(error)}); free disk space, and run again") from None


def load_model(source: str | Path) -> GPT:
    """A trained model, on the CPU, in evaluation mode.

    source: a model folder, a local Hugging Face folder, or a GPT-2 on the Hub ("gpt2", "user/name"). Raises FileError
    if a folder cannot be read, UserError if Hugging Face's weights cannot be loaded.
    """
    folder, name = Path(source), str(source)
    is_hub_name = name in PRESETS or (re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not folder.exists())
    if is_hub_name or "model_type" in _read_json(folder / CONFIG_FILE):
        return from_pretrained(name).eval()
    return load_folder(folder)


def load_folder(folder: Path) -> GPT:
    """The model in a model folder, on the CPU, in evaluation mode.

    Raises FileError if the files cannot be read or do not fit each other.
    """
    try:
        sizes = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        weights = load_file(folder / MODEL_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise FileError(f"cannot load a model from {folder} ({error}); train one with `dvc repro`") from None
    model = GPT(GPTConfig.from_dict(sizes))
    weights["lm_head.weight"] = weights.get("transformer.wte.weight", torch.empty(0))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise FileError(f"the weights in {folder} do not fit its {CONFIG_FILE}: {one_line(error)}") from None
    return model.eval()


def trained_context_length(folder: Path) -> int | None:
    """Sequence length that the model in a folder was trained on, which may be less than its block_size.

    None if its run.json is missing or does not contain it. Positions beyond it were never trained.
    """
    length = _read_json(folder / RUN_FILE).get("sequence_length")
    return length if isinstance(length, int) and length > 0 else None


def masked_documents(folder: Path) -> bool:
    """Whether attention stopped at the borders of documents when the model in a folder was trained."""
    return _read_json(folder / RUN_FILE).get("mask_documents") is True


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is missing or contains anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
