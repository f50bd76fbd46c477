"""`python -m stages.sync`: uploads the outbox to MLflow; idempotent, so that each step arrives once.

With `--follow` it is the uploader of a running stage, and follows its record as it grows. No other module uses MLflow's
client.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from gpt2.errors import BusyError
from gpt2.files import file_lock, read_json_lines
from stages import paths
from stages.process import echo, redact_secrets, warn
from stages.tracking import PATIENCE_S, PREPARATION_PATIENCE_S

if TYPE_CHECKING:
    from mlflow.entities import Run

EXPERIMENT = "gpt2"
RUN_TAG = "pipeline.run_id"
PARENT_TAG = "mlflow.parentRunId"
UNDELIVERED_EXIT_CODE = 74
POLL_S = 1.0
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
METRICS_AT_ONCE = 1000
"""As many as MLflow takes."""
# Attempts end soon, and MLflow does not repeat requests that may have arrived.
SHORT_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class MlflowStore:
    """MLflow's client, and the experiment of this project."""

    def __init__(self) -> None:
        """Creates the database and the experiment if they are missing. Raises any error of MLflow."""
        for variable, value in SHORT_TIMEOUTS.items():
            os.environ.setdefault(variable, value)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        import mlflow

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.database()}"
        # two processes that create a database at once destroy it
        with file_lock(paths.real_root() / ".mlflow.lock", wait_s=PREPARATION_PATIENCE_S):
            if not os.environ.get("MLFLOW_TRACKING_URI") and not paths.database().exists():
                _create_database()
            _prepared()
            mlflow.set_tracking_uri(uri)
            self.client = mlflow.MlflowClient()
            experiment = self.client.get_experiment_by_name(EXPERIMENT)
            if experiment is not None:
                self.experiment_id = experiment.experiment_id
            else:
                self.experiment_id = self.client.create_experiment(EXPERIMENT, artifact_location=_artifacts())


def _artifacts() -> str | None:
    """With the database of ours, artifacts belong to the repository, not to the folder we happen to run in."""
    return None if os.environ.get("MLFLOW_TRACKING_URI") else (paths.real_root() / "mlartifacts").as_uri()


def _create_database() -> None:
    """Creates the database under a temporary name, so that a kill leaves no partial database."""
    import mlflow

    temporary = paths.database().with_name(f"{paths.database().name}.new")
    temporary.unlink(missing_ok=True)
    mlflow.MlflowClient(f"sqlite:///{temporary}").create_experiment(EXPERIMENT, artifact_location=_artifacts())
    temporary.replace(paths.database())


class Uploader:
    """Uploads one record to MLflow."""

    def __init__(self, folder: Path, store: MlflowStore) -> None:
        """Finds or creates the run of the record."""
        self.folder, self.client = folder, store.client
        self.record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        self.status: str | None = None
        self._offset = 0
        self._logged: dict[str, dict[int, float]] = {}
        self.run_id = self._find_or_create(store.experiment_id)
        _send(run=self.run_id)
        self.client.update_run(self.run_id, status="RUNNING")

    def _find_or_create(self, experiment_id: str) -> str:
        """The pipeline run's own run in MLflow, if it was made with the same params; else a child of it."""
        params, ours = self.record["params"], self.record["run_id"]
        runs = self.client.search_runs(
            [experiment_id], f"tags.`{RUN_TAG}` = '{ours}'", order_by=["attributes.start_time ASC"]
        )
        run = next((run for run in runs if _agrees(run, params)), None)
        if run is None:
            tags = {**self.record["tags"], RUN_TAG: ours}
            if runs:
                tags[PARENT_TAG] = runs[0].info.run_id
            elif self.record["mlflow_run_id"]:
                tags["continues"] = self.record["mlflow_run_id"]
            run = self.client.create_run(
                experiment_id, start_time=self.record["began_ms"], tags=tags, run_name=self.record["name"]
            )
        from mlflow.entities import Param

        missing = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        if missing:
            self.client.log_batch(run.info.run_id, params=missing)
        return str(run.info.run_id)

    def deliver(self) -> None:
        """Uploads the events since the last call, in order."""
        from mlflow.entities import RunTag

        events, end = read_json_lines(self.folder / "events.jsonl", self._offset)
        self._log_metrics([event for event in events if "metrics" in event])
        tags = [RunTag(key, value) for event in events for key, value in event.get("tags", {}).items()]
        if tags:
            self.client.log_batch(self.run_id, tags=tags)
        for event in events:
            if "artifact" in event:
                file = self.folder / "artifacts" / event["folder"] / event["artifact"]
                self.client.log_artifact(self.run_id, str(file), event["folder"])
        for event in events:
            if "status" in event:
                self.status = event["status"]
                self.client.set_terminated(self.run_id, self.status, event["time_ms"])
        self._offset = end

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
        return known is None or (self.record["stage"] != "train" and known != value)

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


def _agrees(run: "Run", params: dict[str, str]) -> bool:
    return all(run.data.params.get(key, value) == value for key, value in params.items())


def records(run_id: str = "*") -> list[Path]:
    """The records in the outbox, the oldest first."""
    found = [path.parent for path in paths.outbox().glob(f"{run_id}.*/record.json")]
    return sorted(found, key=lambda folder: (folder / "record.json").stat().st_mtime)


def sync() -> int:
    """Uploads all records that no other process uploads. Returns the number of failures."""
    todo = records()
    if not todo:
        echo("MLflow has everything")
        return 0
    try:
        store = MlflowStore()
    except Exception as error:  # any error of MLflow
        warn(f"MLflow does not answer ({describe(error)}); {len(todo)} records wait in {paths.outbox()}")
        return len(todo)
    failures = 0
    for folder in todo:
        try:
            with file_lock(folder / "writer", what=folder.name):  # it is not being written
                pass
            with file_lock(folder / "lock", what=folder.name):
                uploader = Uploader(folder, store)
                uploader.deliver()
            uploader.close()
            echo(f"{folder.name}: delivered")
        except BusyError as error:
            echo(str(error))
        except Exception as error:
            failures += 1
            warn(f"{folder.name}: {describe(error)}")
    return failures


def follow(folder: Path) -> int:
    """Uploads a record, and older ones of its run, until its stage closes our standard input."""
    stage_ended = threading.Event()
    threading.Thread(target=_watch, args=[stage_ended], daemon=True).start()
    pause_s = SHORTEST_PAUSE_S
    failed = is_last = False
    store: MlflowStore | None = None
    uploader: Uploader | None = None
    monitor: Any = None
    with file_lock(folder / "lock", wait_s=PREPARATION_PATIENCE_S):
        while not is_last:
            is_last = stage_ended.is_set()
            try:
                store = store or MlflowStore()
                if uploader is None:
                    _deliver_older(folder, store)
                    uploader = Uploader(folder, store)
                    if uploader.record["system_metrics"]:
                        monitor = _monitor(uploader.run_id)
                uploader.deliver()
                failed, pause_s = False, SHORTEST_PAUSE_S
            except Exception as error:  # any error of MLflow
                if not failed:
                    _send(failed=describe(error))
                failed, pause_s = True, min(2 * pause_s, LONGEST_PAUSE_S)
            if not is_last:
                stage_ended.wait(pause_s if failed else POLL_S)
    if monitor is not None:
        monitor.finish()
    if failed or uploader is None:
        return UNDELIVERED_EXIT_CODE
    uploader.close()
    return 0


def _watch(stage_ended: threading.Event) -> None:
    """Detects the end of the stage. After that, the time for uploading is limited."""
    sys.stdin.buffer.read()
    stage_ended.set()
    deadline = time.monotonic() + PREPARATION_PATIENCE_S
    while _is_preparing and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(PATIENCE_S)
    os._exit(UNDELIVERED_EXIT_CODE)


def _deliver_older(folder: Path, store: MlflowStore) -> None:
    """Uploads undelivered records of earlier stages of the same run."""
    for older in records(folder.name.partition(".")[0]):
        if older != folder:
            try:
                with file_lock(older / "lock"):
                    uploader = Uploader(older, store)
                    uploader.deliver()
                uploader.close()
            except BusyError:
                continue


def _monitor(run_id: str) -> Any:
    """Use of CPU, memory, disk, network and GPU, as MLflow measures it."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, sampling_interval=5, resume_logging=True)  # type: ignore[no-untyped-call]
    monitor.start()  # type: ignore[no-untyped-call]
    return monitor


def _prepared() -> None:
    """Marks the end of the preparation, and lowers the priority of this process: training comes first."""
    global _is_preparing
    if _to_stage is not None and _is_preparing:
        os.nice(10)
        _send(preparing=False)
    _is_preparing = False


_to_stage: TextIO | None = None
_is_preparing = True


def _send(**message: Any) -> None:
    """Sends a message to the stage, if there is one."""
    if _to_stage is not None:
        with suppress(OSError):  # it has ended
            print(json.dumps(message), file=_to_stage, flush=True)


def describe(error: Exception) -> str:
    """An error in one line, without secrets."""
    return redact_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:200]


def main() -> int:
    """Gives the exit code: 0, or 74 if not everything could be delivered."""
    global _to_stage
    parser = argparse.ArgumentParser(
        prog="python -m stages.sync", description="Upload to MLflow what it does not have yet."
    )
    parser.add_argument("--follow", metavar="RECORD", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.follow:
        _to_stage, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not for the stage
        return follow(paths.outbox() / arguments.follow)
    return UNDELIVERED_EXIT_CODE if sync() else 0


if __name__ == "__main__":
    sys.exit(main())
