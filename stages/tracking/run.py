"""The stage's side of tracking: appends events to a record, and starts the uploader that follows it."""

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt2.errors import BusyError, FileError, Interrupted
from gpt2.files import JsonLines, file_lock, write_json
from stages import paths
from stages.params import Params
from stages.process import StopSignal, redact_secrets, warn
from stages.tracking import description
from stages.tracking.protocol import (
    PATIENCE_S,
    PREPARATION_PATIENCE_S,
    Message,
    Record,
    RunIds,
    events_file,
    metrics_event,
)

CODE = Path(__file__).absolute().parents[2]
TABLES = "tables"
MAX_NOTE_CHARACTERS = 7500
"""MLflow takes 8000, of which the ids of the runs are a part."""
LATER = "`python -m stages.sync` delivers it later; the results are in reports/ as well"


class Run:
    """A growing record. A failure of the record or of MLflow is one warning."""

    def __init__(self, ids: RunIds, stop: StopSignal) -> None:
        self._stop = stop
        self._stage = ""
        self.run_id, self.mlflow_run_id = ids.run_id, ids.mlflow_run_id
        self._found_id: str | None = None
        self._events: JsonLines | None = None
        self._folder: Path | None = None
        self._uploader: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._failure: str | None = None
        self._is_preparing = True
        self._warned = False
        self._held = ExitStack()
        self._waited_s = self._preparation_s = 0.0

    def begin(self, record: Record, events: list[dict[str, Any]]) -> None:
        """Starts the record and its uploader."""
        self._stage = record.stage
        try:
            with file_lock(paths.outbox() / "lock", wait_s=PATIENCE_S):
                self._held.enter_context(file_lock(record.folder / "writer"))
                record.continued().write()
                self._events = JsonLines(events_file(record.folder), events)
            self._folder = record.folder
            self._uploader = start_uploader(record.folder.name)
        except (OSError, BusyError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._events = None
        self._warn(f"cannot write the record for MLflow ({error}); going on without it, the results are in reports/")

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warn(message)

    def _append(self, event: dict[str, Any]) -> None:
        self._listen()
        if self._events is not None:
            try:
                self._events.append({**event, "time_ms": int(time.time() * 1000)})
            except OSError as error:
                self._give_up(error)

    def metrics(self, step: int, values: dict[str, float | None]) -> None:
        """Logs values at a step, without those that are None or not finite."""
        self._append(metrics_event(step, values))

    def inputs(self, datasets: list[dict[str, Any]]) -> None:
        """Logs what the run is made from: the events of `description.datasets`."""
        self._append({"inputs": datasets})

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Logs rows with the same keys as a table that MLflow's page shows beside those of other runs."""
        if self._events is None or self._folder is None or not rows:
            return
        content = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
        try:
            write_json(self._folder / "artifacts" / TABLES / name, content)
        except OSError as error:
            self._give_up(error)
            return
        self._append({"artifact": name, "folder": TABLES})
        self._append({"tags": {"mlflow.loggedArtifacts": json.dumps([{"path": f"{TABLES}/{name}", "type": "table"}])}})

    def describe(self) -> None:
        """Describes the run by its reports; see `description.note`."""
        try:
            self._append({"note": redact_secrets(description.note(self._stage))[:MAX_NOTE_CHARACTERS]})
        except (TypeError, ValueError, LookupError, AttributeError) as error:  # a report that is not one
            self._warn(f"MLflow gets no description of this run ({error!r})")

    def tags(self, values: dict[str, str]) -> None:
        """Sets tags."""
        self._append({"tags": {key: redact_secrets(str(value)) for key, value in values.items()}})

    def files(self, files: list[Path], folder: str) -> None:
        """Copies files into a folder of the run's artifacts."""
        if self._events is None or self._folder is None:
            return
        target = self._folder / "artifacts" / folder
        try:
            target.mkdir(parents=True, exist_ok=True)
            for file in files:
                shutil.copyfile(file, target / file.name)
        except OSError as error:
            self._give_up(error)
            return
        for file in files:
            self._append({"artifact": file.name, "folder": folder})

    def ids(self) -> RunIds:
        """The ids of the run; waits briefly for MLflow's."""
        self._wait(lambda: self._found_id is not None or self._failure is not None)
        return RunIds(self.run_id, self._found_id or self.mlflow_run_id)

    def end(self, status: str) -> None:
        """Appends the final status. Waits briefly for the uploader, unless the stage was interrupted."""
        self._append({"status": status})
        if self._events is not None:
            self._events.close()
        self._held.close()
        if self._uploader is None:
            return
        assert self._uploader.stdin is not None
        with suppress(OSError):
            self._uploader.stdin.close()  # no more events
        done = self._wait(lambda: self._uploader is None or self._uploader.poll() is not None)
        if self._stop:  # the uploader ends by itself
            return
        if not done:
            self._uploader.kill()
            self._uploader.wait()
        if self._uploader.returncode:
            self._warn(f"MLflow does not have everything of this run ({self._failure or 'it is slow'}); {LATER}")

    def _wait(self, condition: Callable[[], bool]) -> bool:
        """Waits for a condition while the uploader lives, up to a time limit."""
        now_s = time.monotonic()
        while True:
            self._listen()
            before_s, now_s = now_s, time.monotonic()
            if self._is_preparing:
                self._preparation_s += now_s - before_s
            else:
                self._waited_s += now_s - before_s
            hopeless = self._stop or self._uploader is None or self._uploader.poll() is not None
            if condition() or hopeless or self._waited_s > PATIENCE_S or self._preparation_s > PREPARATION_PATIENCE_S:
                return condition()
            time.sleep(0.02)

    def _listen(self) -> None:
        """Reads messages of the uploader."""
        if self._uploader is None or self._uploader.stdout is None:
            return
        self._unread += self._uploader.stdout.read() or b""
        *lines, self._unread = self._unread.split(b"\n")
        for message in map(Message.from_json, lines):
            self._found_id = message.mlflow_run_id or self._found_id
            self._is_preparing = self._is_preparing and not message.is_prepared
            self._failure = message.failure or self._failure
        if self._failure is not None:
            self._warn(f"MLflow does not answer ({self._failure}); going on without it, {LATER}")


def start_uploader(record: str, *, follow: bool = True) -> "subprocess.Popen[bytes]":
    """The process that uploads a record: while it grows, or one that is complete and that nobody waits for."""
    root = paths.real_root()
    # a process that outlives the stage cannot use a temporary copy of the repository
    code = CODE if follow or not (root / "stages/sync.py").is_file() else root
    path = os.pathsep.join(filter(None, (str(code), os.environ.get("PYTHONPATH"))))
    pipe = subprocess.PIPE if follow else subprocess.DEVNULL
    uploader = subprocess.Popen(
        [sys.executable, "-m", "stages.sync", "--follow" if follow else "--deliver", record],
        stdin=pipe,
        stdout=pipe,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the stage; the uploader ends after it
        cwd=None if follow else root,
        env={**os.environ, "PYTHONPATH": path},
    )
    if uploader.stdout is not None:
        os.set_blocking(uploader.stdout.fileno(), False)
    return uploader


def read_run_ids() -> RunIds:
    """The ids of the run that trained the model."""
    try:
        content = json.loads(paths.RUN.read_text(encoding="utf-8"))
        mlflow_run_id = content["mlflow_run_id"]
        return RunIds(str(content["run_id"]), None if mlflow_run_id is None else str(mlflow_run_id))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"cannot read {paths.RUN} ({error!r}); run the train stage again") from None


def new_run_ids() -> RunIds:
    """Ids of a new run."""
    return RunIds(uuid.uuid4().hex, None)


def new_record(
    params: Params, stage: str, ids: RunIds, system_metrics: bool = False, node: str | None = None
) -> Record:
    """The record of a stage that begins now."""
    return Record(
        **asdict(ids),
        stage=stage,
        began_ms=int(time.time() * 1000),
        name=description.run_name(params),
        params=description.flatten(params),
        tags={**description.git_tags(), **description.parent_tag()},
        system_metrics=system_metrics,
        node=node,
    )


@contextmanager
def start_run(
    params: Params,
    stage: str,
    ids: RunIds,
    stop: StopSignal,
    *,
    events: list[dict[str, Any]] | None = None,
    system_metrics: bool = False,
    node: str | None = None,
) -> Iterator[Run]:
    """The record of a stage. events: of its earlier sessions, which MLflow may already have."""
    run = Run(ids, stop)
    record = new_record(params, stage, ids, system_metrics, node)
    run.begin(record, [{**event, "time_ms": record.began_ms} for event in events or []])
    status = "FAILED"
    try:
        yield run
        run.describe()
        status = "FINISHED"
    except Interrupted:
        status = "KILLED"
        raise
    finally:
        run.end(status)
