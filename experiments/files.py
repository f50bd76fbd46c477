"""Where the files of a run come from: the workspace, a commit, or the artifacts of an MLflow run."""

import ast
import json
import os
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

from gpt2.errors import UserError, one_line

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}


class Files(Protocol):
    """The files of a run, by their path in the repository: "reports/train/metrics.json"."""

    def read(self, path: str) -> bytes | None:
        """The content of a file; None if it is not there."""


@dataclass(frozen=True)
class WorkspaceFiles:
    """The files as they are in the repository's folder now."""

    root: Path

    def read(self, path: str) -> bytes | None:
        """The content of a file; None if it is not there."""
        try:
            return (self.root / path).read_bytes()
        except OSError:
            return None


@dataclass(frozen=True)
class GitFiles:
    """The files of a commit. commit: its full hash. root: the folder that paths are relative to."""

    root: Path
    commit: str

    def read(self, path: str) -> bytes | None:
        """The content of a file; None if it is not there."""
        return _objects(self.root).read(f"{self.commit}:./{path}")


@dataclass(frozen=True)
class MlflowFiles:
    """The artifacts of an MLflow run. Its params are params.yaml."""

    run_id: str
    tracking_uri: str

    def read(self, path: str) -> bytes | None:
        """The content of a file; None if it is not there."""
        if path == "params.yaml":
            return json.dumps(self._params).encode()  # JSON is YAML
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory() as folder:
            try:
                return Path(self._client.download_artifacts(self.run_id, path, folder)).read_bytes()
            except (MlflowException, OSError):
                return None

    @cached_property
    def run(self) -> Any:
        """What MLflow knows of the run. Raises MlflowException if it does not know it."""
        return self._client.get_run(self.run_id)

    @cached_property
    def _client(self) -> Any:
        from stages.tracking.uploader import SHORT_TIMEOUTS

        for variable, value in {**SHORT_TIMEOUTS, **QUIET}.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient

        return MlflowClient(self.tracking_uri)

    @property
    def _params(self) -> dict[str, dict[str, Any]]:
        sections: dict[str, dict[str, Any]] = {}
        for name, text in self.run.data.params.items():
            section, _, key = name.partition(".")
            try:
                value = ast.literal_eval(text)  # stages.tracking writes str(value)
            except (ValueError, SyntaxError):
                value = text
            sections.setdefault(section, {})[key] = value
        return sections


class GitObjects:
    """Reads files of any commits through one process of git, which takes a tenth of a millisecond for each."""

    def __init__(self, root: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._process = subprocess.Popen(
                ["git", "cat-file", "--batch"],
                cwd=root,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise UserError(f"cannot start git in {root} ({one_line(error)})") from None

    def read(self, name: str) -> bytes | None:
        """The content of a file by its name `COMMIT:./PATH`; None if there is none."""
        assert "\n" not in name
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with self._lock:
            try:
                stdin.write(name.encode() + b"\n")
                stdin.flush()
            except OSError:
                raise UserError("git ended unexpectedly; try `git fsck`") from None
            kind, _, size = stdout.readline().removesuffix(b"\n").rpartition(b" ")
            if not size.isdigit():  # NAME missing
                return None
            content = stdout.read(int(size))
            stdout.read(1)
        return content if kind.endswith(b" blob") else None


@cache
def _objects(root: Path) -> GitObjects:
    return GitObjects(root)


def git(root: Path, *arguments: str) -> str | None:
    """The output of a git command; None if it fails. Raises UserError without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"cannot start git in {root} ({one_line(error)})") from None
    return done.stdout.strip() if done.returncode == 0 else None
