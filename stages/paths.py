"""Paths of inputs and outputs, relative to the folder that DVC runs a stage in; see also dvc.yaml."""

import os
from pathlib import Path

PARAMS = Path("params.yaml")
CORPUS = Path("data/corpus.txt")
DOCUMENTS = Path("data/documents.bin")
CORPUS_FACTS = Path("data/corpus.json")
LINKED = Path("data/linked")
TOKENS = Path("data/tokens")
MODELS = Path("models")
RUN = MODELS / "run.json"
TRAIN_REPORT = Path("reports/train")
EVALUATE_REPORT = Path("reports/evaluate")
SEGMENT_LOSSES = EVALUATE_REPORT / "segment_losses.json"
SPACE_SOURCE = Path("space")
SPACE = Path("dist/space")
HUGGING_FACE = Path("dist/hf")

DRIVE = Path("/content/drive/MyDrive")
"""Where Google Colab mounts a Drive."""


def real_root() -> Path:
    """The root of the repository.

    `dvc exp run --temp` and `--queue` run stages in a temporary copy. What must outlive the copy (the MLflow database,
    checkpoints, downloads) is in the real root.
    """
    root = os.environ.get("DVC_ROOT", os.getcwd())
    return Path(root.split("/.dvc/tmp/exps/")[0]).absolute()


def unfinished_tokens() -> Path:
    """The folder of the tokenize stage's unfinished work. DVC deletes data/tokens before the stage runs again."""
    return real_root() / "data/tokens.partial"


def database() -> Path:
    """The MLflow database, unless MLFLOW_TRACKING_URI is set."""
    return real_root() / "mlflow.db"


def outbox() -> Path:
    """The folder of records that MLflow does not have yet."""
    return real_root() / "mlflow-outbox"


def checkpoints(folder: str | None) -> Path:
    """The folder of checkpoints: `folder` if given, the mounted Drive on Colab, or the repository."""
    if folder is not None:
        return real_root() / Path(folder).expanduser()
    if DRIVE.is_dir():
        return DRIVE / real_root().name / "checkpoints"
    return real_root() / "checkpoints"
