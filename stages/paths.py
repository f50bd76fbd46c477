"""Where everything is. Paths are relative to the folder that DVC runs a stage in; see also dvc.yaml."""

import os
from pathlib import Path

PARAMS = Path("params.yaml")
CORPUS = Path("data/corpus.txt")
CORPUS_FACTS = Path("data/corpus.json")
LINKED = Path("data/linked")
TOKENS = Path("data/tokens")
MODELS = Path("models")
RUN = MODELS / "run.json"
TRAIN_REPORT = Path("reports/train")
EVALUATE_REPORT = Path("reports/evaluate")
SPACE_SOURCE = Path("space")
SPACE = Path("dist/space")
HUGGING_FACE = Path("dist/hf")

DRIVE = Path("/content/drive/MyDrive")
"""Where Google Colab mounts a Drive."""


def real_root() -> Path:
    """The repository's own folder.

    `dvc exp run --temp` and `--queue` run stages in a copy that is deleted afterwards; what has to outlive it (the
    MLflow database, checkpoints, downloads) belongs here.
    """
    root = os.environ.get("DVC_ROOT", os.getcwd())
    return Path(root.split("/.dvc/tmp/exps/")[0]).absolute()


def database() -> Path:
    """MLflow's, unless MLFLOW_TRACKING_URI names another store."""
    return real_root() / "mlflow.db"


def outbox() -> Path:
    """Records for MLflow that are not delivered yet."""
    return real_root() / "mlflow-outbox"


def checkpoints(folder: str | None) -> Path:
    """Where checkpoints are kept: `folder` if given, the Drive on a Colab that has one mounted, or the repository."""
    if folder is not None:
        return real_root() / Path(folder).expanduser()
    if DRIVE.is_dir():
        return DRIVE / real_root().name / "checkpoints"
    return real_root() / "checkpoints"
