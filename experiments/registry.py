"""Which of MLflow's registered models is the champion: the one that `compare` found better, models:/gpt2@champion."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.files import MlflowFiles
from experiments.runs import Run
from experiments.settings import Setting
from gpt2.errors import UserError, one_line
from stages.tracking.models import NAME
from stages.tracking.uploader import EXPERIMENT, SHORT_TIMEOUTS

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
DELIVER = "export it with `dvc repro`, and deliver it with `make sync`"


def set_champion(run_id: str, root: Path = Path()) -> str:
    """Gives the newest registered version of an MLflow run the alias `champion`. Returns the version.

    root: of the repository, for its mlflow.db, unless MLFLOW_TRACKING_URI is set. Raises UserError if the run has no
    model, or if MLflow does not answer.
    """
    client = new_client(root)
    try:
        versions = client.search_model_versions(f"name = '{NAME}' and run_id = '{run_id}'")
    except Exception as error:  # any error of MLflow
        raise UserError(f"MLflow does not answer ({one_line(error)})") from None
    if not versions:
        raise UserError(f"the MLflow run {run_id} has no registered model; {DELIVER}")
    newest = max(versions, key=lambda version: int(version.version))
    client.set_registered_model_alias(NAME, CHAMPION, newest.version)
    return str(newest.version)


def crown(settings: Sequence[Setting], interval: tuple[float, float] | None, root: Path = Path()) -> str:
    """Makes the better of two settings' models the champion. Returns what happened, in a line.

    interval: of the difference of their losses, B minus A, for these models; see `experiments.verdicts.Verdict`. The
    champion is a model, so seeds do not count. Of a setting with several seeds, it is the model with the lowest loss.
    Raises UserError like `set_champion`, and for more than two settings.
    """
    if len(settings) != 2:
        raise UserError(f"--set-champion chooses between two settings, not {len(settings)}; name the two best")
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "champion: unchanged, the losses of the two models do not differ by more than luck"
    runs = (settings[1] if interval[1] < 0 else settings[0]).runs
    best = min(runs, key=lambda run: run.evaluate_metrics.get("loss", math.inf))
    version = set_champion(mlflow_run_id(best, root), root)
    return f"champion: {best.name}, version {version} of models:/{NAME}"


def mlflow_run_id(run: Run, root: Path = Path()) -> str:
    """The id of a run in MLflow: its own, that in its environment.json, or that of the DVC experiment of its name.

    Raises UserError if MLflow does not have it.
    """
    if isinstance(run.files, MlflowFiles):
        return run.files.run_id
    if isinstance(known := run.environment.get("mlflow_run_id"), str):
        return known
    client = new_client(root)
    try:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        name = run.name.replace("'", "")
        found: Any = experiment and client.search_runs([experiment.experiment_id], f"tags.`dvc.experiment` = '{name}'")
    except Exception as error:  # any error of MLflow
        raise UserError(f"MLflow does not answer ({one_line(error)})") from None
    if not found:
        raise UserError(f"MLflow has no run of {run.name!r}; {DELIVER}")
    return str(found[0].info.run_id)  # the newest


def tracking_uri(root: Path) -> str:
    """Where MLflow is: MLFLOW_TRACKING_URI, or the database of the repository. Raises UserError without one."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    database = root.absolute() / "mlflow.db"
    if not database.is_file():
        raise UserError(f"MLflow has no runs yet: {database} does not exist; `dvc repro` makes it")
    return f"sqlite:///{database}"


def new_client(root: Path) -> "MlflowClient":
    """MLflow's client, whose attempts end soon. Raises UserError like `tracking_uri`."""
    uri = tracking_uri(root)
    for variable, value in {**SHORT_TIMEOUTS, "MLFLOW_DISABLE_TELEMETRY": "true"}.items():
        os.environ.setdefault(variable, value)
    from mlflow import MlflowClient

    return MlflowClient(uri)
