"""The uploader's side of tracking: what MLflow is sent. No other module uses MLflow's client."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.errors import BusyError
from gpt2.files import file_lock, read_json_lines
from stages import paths
from stages.tracking.description import MLFLOW_RUN, TRAINING_RUN
from stages.tracking.models import log_model
from stages.tracking.protocol import (
    MODEL_STAGE,
    PARENT_TAG,
    PATIENCE_S,
    PREPARATION_PATIENCE_S,
    Record,
    events_file,
)

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Run

EXPERIMENT = "gpt2"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow shows its pages for training, not those for LLM applications."""
RUN_TAG = "pipeline.run_id"
NOTE_TAG = "mlflow.note.content"
METRICS_AT_ONCE = 1000
"""As many as MLflow takes."""
QUIET = ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT")
# Attempts end soon, and MLflow does not repeat requests that may have arrived.
SHORT_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class MlflowStore:
    """MLflow's client, and the experiment of this project."""

    def __init__(self, on_prepared: Callable[[], None] = lambda: None) -> None:
        """Creates the database and the experiment if they are missing. Raises any error of MLflow."""
        for variable, value in SHORT_TIMEOUTS.items():
            os.environ.setdefault(variable, value)
        for variable in QUIET:
            os.environ.setdefault(variable, "true")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        import mlflow

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.database()}"
        # two processes that create a database at once destroy it
        with file_lock(paths.real_root() / ".mlflow.lock", wait_s=PREPARATION_PATIENCE_S):
            if not os.environ.get("MLFLOW_TRACKING_URI") and not paths.database().exists():
                _create_database()
            on_prepared()
            mlflow.set_tracking_uri(uri)
            self.client = mlflow.MlflowClient()
            experiment = self.client.get_experiment_by_name(EXPERIMENT)
            if experiment is not None:
                self.experiment_id = experiment.experiment_id
            else:
                self.experiment_id = self.client.create_experiment(
                    EXPERIMENT, artifact_location=_artifacts(), tags=EXPERIMENT_TAGS
                )


def _artifacts() -> str | None:
    """With the database of ours, artifacts belong to the repository, not to the folder we happen to run in."""
    return None if os.environ.get("MLFLOW_TRACKING_URI") else (paths.real_root() / "mlartifacts").as_uri()


def _create_database() -> None:
    """Creates the database under a temporary name, so that a kill leaves no partial database."""
    import mlflow

    temporary = paths.database().with_name(f"{paths.database().name}.new")
    temporary.unlink(missing_ok=True)
    mlflow.MlflowClient(f"sqlite:///{temporary}").create_experiment(
        EXPERIMENT, artifact_location=_artifacts(), tags=EXPERIMENT_TAGS
    )
    temporary.replace(paths.database())


class Uploader:
    """Uploads one record to MLflow."""

    def __init__(self, folder: Path, store: MlflowStore) -> None:
        """Finds or creates the run of the record."""
        self.folder, self.client = folder, store.client
        self.record = Record.read(folder)
        self.status: str | None = None
        self._offset = 0
        self._logged: dict[str, dict[int, float]] = {}
        self.training_run_id = ""
        self.run_id = self._find_or_create(store.experiment_id)
        if self.record.stage != MODEL_STAGE:
            self.client.update_run(self.run_id, status="RUNNING")

    def _find_or_create(self, experiment_id: str) -> str:
        """The pipeline run's own run in MLflow, if it was made with the same params; else a child of it."""
        params, ours = self.record.params, self.record.run_id
        runs = self.client.search_runs(
            [experiment_id], f"tags.`{RUN_TAG}` = '{ours}'", order_by=["attributes.start_time ASC"]
        )
        run = next((run for run in runs if _agrees(run, params)), None)
        parent = self.record.tags.get(PARENT_TAG)
        if run is not None and parent and run is runs[0] and run.data.tags.get(PARENT_TAG) != parent:
            self.client.set_tag(run.info.run_id, PARENT_TAG, parent)
        if run is None:
            tags = {**self.record.tags, RUN_TAG: ours}
            if runs:
                tags[PARENT_TAG] = runs[0].info.run_id
            elif self.record.mlflow_run_id:
                tags["continues"] = self.record.mlflow_run_id
            run = self.client.create_run(
                experiment_id, start_time=self.record.began_ms, tags=tags, run_name=self.record.name
            )
        from mlflow.entities import Param

        self.training_run_id = (runs[0] if runs else run).info.run_id
        missing = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        if missing:
            self.client.log_batch(run.info.run_id, params=missing)
        return str(run.info.run_id)

    def deliver(self) -> None:
        """Uploads the events since the last call, in order."""
        from mlflow.entities import RunTag

        events, end = read_json_lines(events_file(self.folder), self._offset)
        self._log_metrics([event for event in events if "metrics" in event])
        tags = [RunTag(key, value) for event in events for key, value in event.get("tags", {}).items()]
        if tags:
            self.client.log_batch(self.run_id, tags=tags)
        for event in events:
            if "artifact" in event:
                file = self.folder / "artifacts" / event["folder"] / event["artifact"]
                self.client.log_artifact(self.run_id, str(file), event["folder"])
            if "inputs" in event:
                self.client.log_inputs(self.run_id, [_dataset(each) for each in event["inputs"]])
            if "note" in event:
                text = event["note"].replace(MLFLOW_RUN, self.run_id).replace(TRAINING_RUN, self.training_run_id)
                self.client.set_tag(self.run_id, NOTE_TAG, text)
            if "model" in event:
                log_model(self.client, self.client.get_run(self.run_id), self.folder / "artifacts", event["model"])
        for event in events:
            if "status" in event:
                self.status = event["status"]
                self._terminate(event["time_ms"])
        self._offset = end

    def _terminate(self, time_ms: int) -> None:
        is_new = self.record.stage != MODEL_STAGE or self.client.get_run(self.run_id).info.status == "RUNNING"
        if is_new:  # a model is delivered after its run
            self.client.set_terminated(self.run_id, self.status, time_ms)

    def _log_metrics(self, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        new = [
            Metric(key, value, event["time_ms"], event["step"])
            for event in events
            for key, value in event["metrics"].items()
            if self._is_new(key, event["step"], value)
        ]
        for start in range(0, len(new), METRICS_AT_ONCE):
            part = new[start : start + METRICS_AT_ONCE]
            try:
                self.client.log_batch(self.run_id, metrics=part)
            except Exception:
                self._logged.clear()  # it may have arrived nevertheless: MLflow is asked the next time
                raise
            for metric in part:
                self._logged[metric.key][metric.step] = metric.value

    def _is_new(self, key: str, step: int, value: float) -> bool:
        """Whether MLflow lacks it. A step of training is one fact; an evaluation that is repeated may differ."""
        if key not in self._logged:
            history = self.client.get_metric_history(self.run_id, key)
            self._logged[key] = {metric.step: metric.value for metric in history}
        known = self._logged[key].get(step)
        return known is None or (self.record.stage != "train" and known != value)

    def close(self) -> None:
        """Deletes the delivered record, unless a new session of the stage writes to it."""
        with file_lock(paths.outbox() / "lock", wait_s=PATIENCE_S):
            try:
                with file_lock(self.folder / "writer"):
                    if self.status is None:  # it was killed
                        self.client.set_terminated(self.run_id, "KILLED")
                    shutil.rmtree(self.folder)
            except BusyError:
                pass


def _dataset(facts: dict[str, str]) -> "DatasetInput":
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(**{key: value for key, value in facts.items() if key != "context"})
    return DatasetInput(dataset, [InputTag("mlflow.data.context", facts["context"])])


def _agrees(run: "Run", params: dict[str, str]) -> bool:
    return all(run.data.params.get(key, value) == value for key, value in params.items())


def monitor_system(run_id: str, node: str | None) -> Any:
    """Use of CPU, memory, disk, network and GPU, as MLflow measures it. node: part of the names of the metrics."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
        run_id, sampling_interval=5, resume_logging=True, node_id=node
    )
    monitor.start()  # type: ignore[no-untyped-call]
    return monitor
