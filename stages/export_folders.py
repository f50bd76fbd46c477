"""Writes and verifies the folders of the export: dist/space and dist/hf."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2.errors import FileError
from gpt2.files import sha256_of, write_json, write_text
from gpt2.hub import export
from gpt2.model.transformer import GPT
from stages import paths

HARDWARE = {"cpu": "cpu-basic", "zerogpu": "zero-a10g"}
LOAD_AND_SAVE_LOGITS = """
import sys
from pathlib import Path

import torch

from space.model_files import load_metadata, load_model

load_metadata(Path())
torch.save(load_model(Path())(torch.arange(int(sys.argv[1]))[None])[0].detach(), sys.argv[2])
"""


def write_space(folder: Path, model: GPT, facts: dict[str, Any], serving_files: Iterable[str]) -> None:
    """Writes a Gradio Space: model, page, requirements, card, and a manifest with the facts and SHA-256 sums."""
    _make_empty(folder)
    export.save_space_model(model, folder)
    shutil.copyfile(paths.SPACE_SOURCE / "app.py", folder / "app.py")
    for file in serving_files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / file)
    shutil.copyfile(paths.SPACE_SOURCE / "packages.txt", folder / "packages.txt")  # a compiler, for the kernels
    shutil.copyfile(paths.TRAIN_REPORT / "loss.png", folder / "loss.png")
    requirements = (paths.SPACE_SOURCE / "requirements.txt").read_text(encoding="utf-8")
    write_text(folder / "requirements.txt", requirements_for(facts["target"], requirements))
    card = (paths.SPACE_SOURCE / "README.md").read_text(encoding="utf-8")
    write_text(folder / "README.md", fill_card(card, facts))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    write_json(folder / "manifest.json", {"model": facts, "sha256": sums})


def write_hugging_face(folder: Path, model: GPT, facts: dict[str, Any]) -> None:
    """Writes a model folder for `transformers`, with its card."""
    _make_empty(folder)
    export.save_pretrained(model, folder)
    card = (paths.SPACE_SOURCE / "MODEL_CARD.md").read_text(encoding="utf-8")
    write_text(folder / "README.md", fill_card(card, facts))


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def fill_card(template: str, facts: dict[str, Any]) -> str:
    """The text of a card: replaces each `{{name}}` in the template by that fact."""
    losses = facts["dtype_losses"]
    values = {
        **facts,
        "title": json.dumps(facts["title"]),  # a YAML string
        "heading": facts["title"],
        "gradio": importlib.metadata.version("gradio"),
        "hardware": HARDWARE[facts["target"]],
        "fallback": f"\n\nThe corpus is a fallback: {facts['fallback_reason']}." if facts["fallback_reason"] else "",
        "tasks": "".join(f"\n| {name} | {result} |" for name, result in facts["tasks"].items()),
        "losses": ", ".join(
            f"{name} {loss:.4f}" + (f" ({100 * (loss / losses['fp32'] - 1):+.2f} %)" if name != "fp32" else "")
            for name, loss in losses.items()
        ),
    }
    for name, value in values.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        template = template.replace("{{" + name + "}}", shown)
    return template


def requirements_for(target: str, requirements: str) -> str:
    """The requirements of a Space, pinned to the installed versions, given those for a CPU.

    ZeroGPU supports only some versions of torch, and needs the package `spaces`.
    """
    if target == "zerogpu":
        kept = [line for line in requirements.splitlines() if not line.startswith(("#", "-")) and line != "torch"]
        return pinned("\n".join(kept)) + "spaces\ntorch>=2.8,<2.12\n"
    return pinned(requirements)


def pinned(requirements: str) -> str:
    """Pins each package to its installed version. Keeps other lines."""
    lines = []
    for line in requirements.splitlines():
        is_package = line and not line.startswith(("#", "-"))
        version = importlib.metadata.version(line).partition("+")[0] if is_package else ""
        lines.append(f"{line}=={version}" if is_package else line)
    return "\n".join(lines) + "\n"


def verify_space(folder: Path, model: GPT) -> float:
    """Loads a Space as its app does, and compares its logits with the model's. Returns the largest difference.

    The process that loads it has only the files of the folder on its path. Raises FileError if they cannot be loaded,
    or if the logits differ.
    """
    result = folder / ".logits.pt"

    def space_logits(tokens: Tensor) -> Tensor:
        command = [sys.executable, "-c", LOAD_AND_SAVE_LOGITS, str(tokens.size(1)), result.name]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=space_environment())
        if done.returncode:
            raise FileError(f"{folder} cannot be loaded: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
        logits: Tensor = torch.load(result, weights_only=True)
        return logits

    try:
        return export.verify_logits(model, space_logits, str(folder))
    finally:
        result.unlink(missing_ok=True)


def space_environment() -> dict[str, str]:
    """The environment without PYTHONPATH, which may include the repository; Python writes no __pycache__ in it."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1"}


def verify_hugging_face(folder: Path, model: GPT) -> float:
    """Loads a folder with transformers, and compares its logits with the model's. Returns the largest difference.

    Raises FileError if the tokenizer or the logits differ.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from gpt2 import tokenizer

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    theirs = AutoModelForCausalLM.from_pretrained(str(folder))
    text = "To be, or not to be: that is the question.\n\n  naïve 漢字 🙂"
    if AutoTokenizer.from_pretrained(str(folder))(text)["input_ids"] != tokenizer.encode(text):
        raise FileError(f"{folder} has another tokenizer than the model was trained with")
    return export.verify_logits(model, lambda tokens: theirs(tokens).logits, str(folder))
