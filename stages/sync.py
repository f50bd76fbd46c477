"""`python -m stages.sync` uploads the outbox to MLflow. With `--follow`, it uploads one record while its stage runs.

The protocol is described in `stages.tracking.protocol`.
"""

import argparse
import os
import re
import shutil
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from gpt2.errors import BusyError
from gpt2.files import file_lock
from stages import paths
from stages.process import echo, redact_secrets, warn
from stages.tracking.protocol import MODEL_STAGE, PATIENCE_S, PREPARATION_PATIENCE_S, Message, is_record, records
from stages.tracking.uploader import MlflowStore, Uploader, monitor_system

UNDELIVERED_EXIT_CODE = 74
REFUSED = re.compile(r"error code 40[13]\b")
"""HTTP's statuses of a missing or wrong password, and of a user who may not write, in errors of MLflow."""
POLL_S = 1.0
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0


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
            upload(folder, store)
            echo(f"{folder.name}: delivered")
        except BusyError as error:
            echo(str(error))
        except Exception as error:
            failures += 1
            warn(f"{folder.name}: {describe(error)}")
    return failures


def upload(folder: Path, store: MlflowStore) -> None:
    """Uploads a record that does not grow any more, unless another process has just done so.

    Raises BusyError, or any error of MLflow.
    """
    with file_lock(folder / "lock", what=folder.name):
        if not is_record(folder):
            remove_locks(folder)
            return
        uploader = Uploader(folder, store)
        uploader.deliver()
    uploader.close()


def remove_locks(folder: Path) -> None:
    """Deletes what asking for the locks of a record has left, after another process delivered it."""
    with file_lock(paths.outbox() / "lock", wait_s=PATIENCE_S):
        if not is_record(folder):
            shutil.rmtree(folder, ignore_errors=True)


def deliver(folder: Path) -> int:
    """Uploads one record, in the background of other work. Returns the exit code."""
    if hasattr(os, "nice"):
        os.nice(10)
    try:
        upload(folder, MlflowStore())
    except Exception as error:  # any error of MLflow
        warn(f"{folder.name}: {describe(error)}")
        return UNDELIVERED_EXIT_CODE
    return 0


class Follower:
    """Uploads a record while its stage runs, and the older records of the same run first."""

    def __init__(self, folder: Path, stage: TextIO) -> None:
        """stage: where messages to the stage are written."""
        self.folder, self._stage = folder, stage
        self._stage_ended = threading.Event()
        self._prepared = threading.Event()
        self._store: MlflowStore | None = None
        self._uploader: Uploader | None = None
        self._monitor: Any = None
        self._is_nice = False

    def follow(self) -> int:
        """Uploads until the stage closes our standard input. Returns the exit code."""
        threading.Thread(target=self._watch, daemon=True).start()
        pause_s = SHORTEST_PAUSE_S
        failed = is_last = False
        with file_lock(self.folder / "lock", wait_s=PREPARATION_PATIENCE_S):
            while not is_last:
                is_last = self._stage_ended.is_set()
                try:
                    self._deliver()
                    failed, pause_s = False, SHORTEST_PAUSE_S
                except Exception as error:  # any error of MLflow
                    if not failed:
                        self._send(Message(failure=describe(error)))
                    failed, pause_s = True, min(2 * pause_s, LONGEST_PAUSE_S)
                    self._lower_priority()
                if not is_last:
                    self._stage_ended.wait(pause_s if failed else POLL_S)
        if self._monitor is not None:
            self._monitor.finish()
        if failed or self._uploader is None:
            return UNDELIVERED_EXIT_CODE
        self._uploader.close()
        return 0

    def _deliver(self) -> None:
        self._store = self._store or MlflowStore(self._end_preparation)
        if self._uploader is None:
            for older in records(self.folder.name.partition(".")[0]):
                if older != self.folder and not older.name.endswith(f".{MODEL_STAGE}"):  # models can be large
                    with suppress(BusyError):
                        upload(older, self._store)
            self._uploader = Uploader(self.folder, self._store)
            self._send(Message(mlflow_run_id=self._uploader.run_id))
            self._lower_priority()
            if self._uploader.record.system_metrics:
                self._monitor = monitor_system(self._uploader.run_id, self._uploader.record.node)
        self._uploader.deliver()

    def _lower_priority(self) -> None:
        """Training comes first from now on. Until it has the id of the run, its stage may be waiting for us."""
        if not self._is_nice and hasattr(os, "nice"):
            os.nice(10)
        self._is_nice = True

    def _watch(self) -> None:
        """Detects the end of the stage. After that, the time for uploading is limited."""
        sys.stdin.buffer.read()
        self._stage_ended.set()
        self._prepared.wait(PREPARATION_PATIENCE_S)
        time.sleep(PATIENCE_S)
        os._exit(UNDELIVERED_EXIT_CODE)

    def _end_preparation(self) -> None:
        """Says that what follows is work of the server."""
        if not self._prepared.is_set():
            self._send(Message(is_prepared=True))
            self._prepared.set()

    def _send(self, message: Message) -> None:
        with suppress(OSError):  # the stage has ended
            print(message.to_json(), file=self._stage, flush=True)


def describe(error: Exception) -> str:
    """An error in one line, without secrets."""
    if REFUSED.search(str(error)):
        return "it refuses this user or password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    return redact_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:200]


def main() -> int:
    """Returns the exit code: 0, or 74 if not everything could be delivered."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.sync", description="Upload to MLflow what it does not have yet."
    )
    parser.add_argument("--follow", metavar="RECORD", help=argparse.SUPPRESS)
    parser.add_argument("--deliver", metavar="RECORD", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.follow:
        stage, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not for the stage
        return Follower(paths.outbox() / arguments.follow, stage).follow()
    if arguments.deliver:
        return deliver(paths.outbox() / arguments.deliver)
    return UNDELIVERED_EXIT_CODE if sync() else 0


if __name__ == "__main__":
    sys.exit(main())
