"""MLflow, as a mirror: what stands in it stands in files too, and no failure of it stops a stage.

One run for each pipeline run: `train` starts it and writes its id to models/run.json, the later stages go on with it.
"""

import json
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.errors import FileError, Interrupted
from gpt2.files import hold
from stages import paths
from stages.params import Params
from stages.process import warn

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "gpt2"
PARENT_TAG = "mlflow.parentRunId"
MAX_PARAM_CHARACTERS = 6000
"""MLflow refuses longer ones."""
# MLflow's own defaults would let a server that does not answer hold up training for minutes.
IMPATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class Run:
    """An MLflow run. After a first failure it warns, and the rest of the stage goes on without."""

    def __init__(self, client: "MlflowClient | None", run_id: str | None) -> None:
        self.client, self.id = client, run_id
        self._logged_step = -1

    def metrics(self, step: int, values: dict[str, float | None]) -> None:
        """Logs values at a step; those that are None, or of a step that an earlier session logged, are left out."""
        if step <= self._logged_step:
            return

        def log(client: "MlflowClient", run_id: str) -> None:
            from mlflow.entities import Metric

            now_ms = int(time.time() * 1000)
            client.log_batch(run_id, metrics=[Metric(k, v, now_ms, step) for k, v in values.items() if v is not None])

        self._attempt(log)

    def skip_logged(self, key: str) -> None:
        """Leaves out the steps for which a run that goes on has this metric already."""

        def find(client: "MlflowClient", run_id: str) -> None:
            self._logged_step = max((m.step for m in client.get_metric_history(run_id, key)), default=-1)

        self._attempt(find)

    def tags(self, values: dict[str, str]) -> None:
        """Sets tags."""

        def log(client: "MlflowClient", run_id: str) -> None:
            from mlflow.entities import RunTag

            client.log_batch(run_id, tags=[RunTag(k, str(v)) for k, v in values.items()])

        self._attempt(log)

    def files(self, files: list[Path], folder: str) -> None:
        """Copies files into a folder of the run's artifacts."""

        def log(client: "MlflowClient", run_id: str) -> None:
            for file in files:
                client.log_artifact(run_id, str(file), folder)

        self._attempt(log)

    def _attempt(self, action: Callable[["MlflowClient", str], None]) -> None:
        if self.client is None or self.id is None:
            return
        try:
            action(self.client, self.id)
        except Interrupted:
            raise
        except Exception as error:  # whatever a tracking server or its client comes up with
            self.client = None
            warn(f"MLflow does not answer ({_one_line(error)}); going on without it, the results are in reports/")


def read_run_id() -> str | None:
    """The MLflow run that trained the model; None if it was trained without MLflow."""
    try:
        run_id = json.loads(paths.RUN.read_text(encoding="utf-8"))["mlflow_run_id"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"cannot read {paths.RUN} ({error}); run the train stage again") from None
    return run_id if isinstance(run_id, str) else None


@contextmanager
def open_run(params: Params, run_id: str | None = None, *, system_metrics: bool = False) -> Iterator[Run]:
    """The run of this pipeline run, for a stage: `run_id` if it can go on, a new one otherwise.

    A run that was trained with other params of a later stage is not changed: the later stages share a child of it.
    """
    try:
        run = _open(params, run_id, system_metrics)
    except Interrupted:
        raise
    except Exception as error:  # as in Run._attempt
        warn(f"MLflow cannot be used ({_one_line(error)}); going on without it, the results are in reports/")
        run = Run(None, run_id)
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except Interrupted:
        status = "KILLED"
        raise
    finally:
        if run.client is not None:
            run._attempt(lambda *_: _end(status))


def _open(params: Params, run_id: str | None, system_metrics: bool) -> Run:
    for variable, value in IMPATIENCE.items():
        os.environ.setdefault(variable, value)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    root = paths.real_root()
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri or f"sqlite:///{root / 'mlflow.db'}")
    client = mlflow.MlflowClient()
    with hold(root / ".mlflow.lock", wait=True):  # two processes that create a database at once destroy it
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            # with the default store, artifacts belong to the repository, not to the folder we happen to run in
            location = None if uri else (root / "mlartifacts").as_uri()
            experiment_id = client.create_experiment(EXPERIMENT, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
    flat = flatten(params)
    tags = git_tags()
    trained = _find(client, run_id)
    known = None
    if trained is not None:
        children = client.search_runs([experiment_id], f"tags.`{PARENT_TAG}` = '{run_id}'")
        fitting = (run for run in (trained, *children) if all(run.data.params.get(k, v) == v for k, v in flat.items()))
        known = next(fitting, None)
        tags[PARENT_TAG] = trained.info.run_id
    elif run_id is not None:
        tags["continues"] = run_id
    if system_metrics:
        mlflow.set_system_metrics_sampling_interval(5)  # type: ignore[no-untyped-call]
    active = mlflow.start_run(
        run_id=known.info.run_id if known else None,
        experiment_id=experiment_id,
        run_name=None if known else os.environ.get("DVC_EXP_NAME"),
        tags=None if known else tags,
        log_system_metrics=system_metrics,
    )
    if known is None:
        mlflow.log_params(flat)
    return Run(client, active.info.run_id)


def _end(status: str) -> None:
    import mlflow

    mlflow.end_run(status)


def _find(client: "MlflowClient", run_id: str | None) -> Any:
    """The run of this id; None if the store does not know it or it was deleted."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        found = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return found if found.info.lifecycle_stage == "active" else None


def flatten(params: Params) -> dict[str, str]:
    """params.yaml as MLflow's params, `section.key`; without `runtime`, which does not decide the results."""
    return {
        f"{section}.{key}": str(value)[:MAX_PARAM_CHARACTERS]
        for section, values in asdict(params).items()
        if section != "runtime"
        for key, value in values.items()
    }


def git_tags() -> dict[str, str]:
    """The commit, whether more than results and params (which are logged) differs from it, and the DVC experiment."""
    tags = {}
    if commit := _git("rev-parse", "HEAD"):
        changed = _git("status", "--porcelain", "--", ".", ":!reports", ":!dvc.lock", ":!params.yaml")
        tags = {"git.commit": commit, "git.dirty": str(bool(changed)).lower()}
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = experiment
    return tags


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository: the tags are left out
        return ""
    return result.stdout.strip()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
