"""The protocol between a stage and the uploader: a record on the disk, and messages over two pipes.

A stage never calls MLflow. It appends events to a record in the outbox, and another process uploads them:

    mlflow-outbox/lock                          held while a record is made or deleted
    mlflow-outbox/<run>.<stage>/record.json     `Record`: the params and tags of the run
                                events.jsonl    one event per line, in order
                                artifacts/      copies of the files that events name, and links to weights
                                writer          locked by the stage while it appends
                                lock            locked by the process that uploads

An event has the key `time_ms`, and the keys of one of these:

    {"step": 10, "metrics": {"train/loss": 3.1}}
    {"tags": {"model.sha256": "e308..."}}
    {"artifact": "loss.png", "folder": "reports/train"}
    {"inputs": [...]}                           datasets, as `description.datasets` describes them
    {"note": "| validation loss | ..."}         Markdown; MLFLOW_RUN and TRAINING_RUN in it stand for ids of runs
    {"model": {...}}                            `handover.ModelFacts`, about artifacts/model/
    {"status": "FINISHED"}                      the last one; KILLED or FAILED otherwise

The stage starts `python -m stages.sync --follow <run>.<stage>`, which uploads the events as they come, and sends
`Message` lines back on its standard output. The stage closes the uploader's standard input when no more events come;
then the uploader has PATIENCE_S to finish. A record that is delivered is deleted. All others stay, and `python -m
stages.sync` uploads them later. Uploading is idempotent: a step that MLflow already has is not logged again.

A model can be large, so it is a record of its own, <run>.model. `python -m stages.sync --deliver <run>.model` uploads
it after the stage, which does not wait.

One pipeline run is one MLflow run. `train` makes its `RunIds` and writes them to models/run.json; later stages continue
it.
"""

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gpt2.files import write_json
from stages import paths

RECORD_FILE = "record.json"
PATIENCE_S = 4.0
"""Total time that a stage waits for MLflow, mostly at its end."""
MODEL_STAGE = "model"
"""In the place of a stage: the record of an exported model."""
PARENT_TAG = "mlflow.parentRunId"
PREPARATION_PATIENCE_S = 60.0
"""The same while MLflow is imported or its database created, which takes seconds of CPU time."""


@dataclass(frozen=True)
class RunIds:
    """The ids of a pipeline run: our own, and MLflow's (None if MLflow was not available)."""

    run_id: str
    mlflow_run_id: str | None


@dataclass(frozen=True)
class Record:
    """The content of record.json. params and tags are MLflow's; name is the DVC experiment's, if there is one.

    node: whose system metrics these are, if several nodes train.
    """

    run_id: str
    mlflow_run_id: str | None
    stage: str
    began_ms: int
    name: str | None
    params: dict[str, str]
    tags: dict[str, str]
    system_metrics: bool
    node: str | None = None

    @property
    def folder(self) -> Path:
        """Where this record is kept."""
        return paths.outbox() / f"{self.run_id}.{self.stage}"

    def continued(self) -> "Record":
        """This record, with the parent that an undelivered record of an earlier session names."""
        try:
            earlier = Record.read(self.folder).tags
        except (OSError, ValueError, TypeError):
            earlier = {}
        kept = {PARENT_TAG: earlier[PARENT_TAG]} if PARENT_TAG in earlier else {}
        return replace(self, tags={**kept, **self.tags})

    def write(self) -> None:
        """Writes record.json. Raises OSError."""
        write_json(self.folder / RECORD_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """The record in a folder. Raises OSError, ValueError or TypeError."""
        return cls(**json.loads((folder / RECORD_FILE).read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Message:
    """What the uploader reports to the stage: the id of MLflow's run, the end of the preparation, or a failure."""

    mlflow_run_id: str | None = None
    is_prepared: bool = False
    failure: str | None = None

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: bytes) -> "Message":
        """The message of a line. Raises ValueError or TypeError."""
        return cls(**json.loads(line))


def records(run_id: str = "*") -> list[Path]:
    """The folders of the records in the outbox, the oldest first."""
    written_s = {}
    for path in paths.outbox().glob(f"{run_id}.*/{RECORD_FILE}"):
        with suppress(FileNotFoundError):  # another process has delivered it meanwhile
            written_s[path.parent] = path.stat().st_mtime
    return sorted(written_s, key=written_s.__getitem__)


def is_record(folder: Path) -> bool:
    """Whether a folder is a record that is not delivered yet."""
    return (folder / RECORD_FILE).is_file()


def events_file(folder: Path) -> Path:
    """The events of a record."""
    return folder / "events.jsonl"


def metrics_event(step: int, values: dict[str, float | None]) -> dict[str, Any]:
    """The event of metrics at a step, without those that are None or not finite."""
    finite = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
    return {"step": step, "metrics": finite}
