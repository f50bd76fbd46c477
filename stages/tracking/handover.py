"""The stage's side of an exported model: its files in a record of their own, which is delivered after the stage."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpt2.errors import BusyError
from gpt2.files import JsonLines, file_lock, sha256_of
from stages import paths
from stages.params import Params
from stages.process import warn
from stages.tracking.protocol import MODEL_STAGE, PATIENCE_S, RunIds, events_file
from stages.tracking.run import new_record, start_uploader

MODEL = paths.MODELS / "model.safetensors"
CODE_FILE = Path(__file__).absolute().parents[2] / "space/text_generator.py"
FOLDER = "model"
WEIGHTS = "gpt_model.pt"
SMALL_FILES = ("gpt_config.pt", "manifest.json")
SHA256_TAG = "model.sha256"
NOT_NEEDED = ("gradio",)  # of the requirements of a Space


@dataclass(frozen=True)
class ModelFacts:
    """The event of a model. sha256: of models/model.safetensors. requirements: lines for pip. example: a prompt.

    description: of the version in the registry.
    """

    sha256: str
    requirements: list[str]
    example: str
    description: str


def hand_over_model(params: Params, ids: RunIds, space: Path, code: Iterable[str], facts: dict[str, Any]) -> None:
    """Gives an exported Space to a process that logs it to MLflow as a model, and does not wait for it.

    code: the modules that load the model, relative to `space`. facts: of its manifest. A failure is one warning.
    """
    record = new_record(params, MODEL_STAGE, ids)
    try:
        with file_lock(paths.outbox() / "lock", wait_s=PATIENCE_S):
            shutil.rmtree(record.folder, ignore_errors=True)  # of an earlier export of this run
            event = asdict(copy_model(space, code, record.folder / "artifacts", facts))
            times = {"time_ms": record.began_ms}
            JsonLines(events_file(record.folder), [{"model": event, **times}, {"status": "FINISHED", **times}]).close()
            record.write()
        start_uploader(record.folder.name, follow=False)
    except (OSError, BusyError) as error:
        warn(f"cannot write the model's record for MLflow ({error}); the model is in {space}")


def copy_model(space: Path, code: Iterable[str], target: Path, facts: dict[str, Any]) -> ModelFacts:
    """Puts the model of a Space into a folder `model`: weights (linked, if possible), metadata and code."""
    folder = target / FOLDER
    for name in SMALL_FILES:
        copy(space / name, folder / name)
    for name in code:
        copy(space / name, folder / "code" / name)
    copy(CODE_FILE, folder / CODE_FILE.name)
    link(space / WEIGHTS, folder / WEIGHTS)
    requirements = (space / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return ModelFacts(
        sha256=sha256_of(MODEL),
        requirements=[
            line for line in requirements if line and line[0] != "#" and line.partition("==")[0] not in NOT_NEEDED
        ],
        example=facts["examples"][0],
        description=f"validation loss {facts['validation_loss']}, perplexity {facts['perplexity']}; "
        f"{facts['parameters']:,} parameters, trained on {facts['corpus']}",
    )


def copy(source: Path, target: Path) -> None:
    """Copies a file, and makes the folder for it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def link(source: Path, target: Path) -> None:
    """A hard link where the file system allows it, else a copy. Exported files are replaced, never written into."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
