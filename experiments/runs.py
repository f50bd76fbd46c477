"""Finished runs, wherever they are: DVC experiments, commits, the workspace, MLflow runs. Nothing here imports DVC."""

import difflib
import io
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from experiments.files import Files, GitFiles, MlflowFiles, WorkspaceFiles, git
from gpt2.errors import UserError, one_line
from stages import paths
from stages.segment_losses import SegmentLosses

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
WORKSPACE = "workspace"
EXPERIMENT_REF = re.compile(r"refs/exps/([0-9a-f]{2})/([0-9a-f]{38})/([^/]+)")
"""The other refs below refs/exps/ are DVC's own: queues, and what runs now."""
MLFLOW_ID = re.compile(r"[0-9a-f]{32}")
NO_RESULT_SECTIONS = ("runtime",)
"""Sections of params.yaml that do not change results."""


@dataclass(frozen=True)
class Run:
    """A run and its files, read when they are first used.

    name: as people know it: the name of the experiment, the branch, the short commit, "workspace", or MLflow's name of
    the run. commit: its full hash; None for the workspace, and for an MLflow run without one.
    """

    name: str
    commit: str | None
    files: Files

    @cached_property
    def params(self) -> dict[str, Any]:
        """params.yaml, nested; empty if it is missing or damaged."""

        def load(content: bytes) -> dict[str, Any]:
            from ruamel.yaml import YAML
            from ruamel.yaml.error import YAMLError

            try:
                loaded = YAML(typ="safe", pure=True).load(content)
            except YAMLError as error:
                raise ValueError(str(error)) from None
            return {section: values for section, values in _mapping(loaded).items() if isinstance(values, dict)}

        return self._read("params.yaml", load) or {}

    @cached_property
    def train_metrics(self) -> dict[str, float]:
        """The numbers of reports/train/metrics.json; empty if it is missing or damaged."""
        return self._read("reports/train/metrics.json", _numbers) or {}

    @cached_property
    def evaluate_metrics(self) -> dict[str, float]:
        """The numbers of reports/evaluate/metrics.json; empty if it is missing or damaged."""
        return self._read("reports/evaluate/metrics.json", _numbers) or {}

    @cached_property
    def history(self) -> "pd.DataFrame | None":
        """reports/train/history.csv, a row for each logged step."""

        def load(content: bytes) -> "pd.DataFrame":
            import pandas as pd

            return pd.read_csv(io.BytesIO(content))

        return self._read("reports/train/history.csv", load)

    @cached_property
    def samples(self) -> list[dict[str, str]]:
        """The prompts and samples of reports/evaluate/samples.json; empty if it is missing or damaged."""

        def load(content: bytes) -> list[dict[str, str]]:
            rows = json.loads(content)
            return [{str(key): str(text) for key, text in _mapping(row).items()} for row in rows]

        return self._read("reports/evaluate/samples.json", load) or []

    @cached_property
    def losses(self) -> SegmentLosses | None:
        """The loss of each segment of the held-out text."""
        return self._read(paths.SEGMENT_LOSSES.as_posix(), SegmentLosses.from_json)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """reports/train/environment.json: where and with what the run was trained; empty if it is missing."""
        return self._read("reports/train/environment.json", lambda content: _mapping(json.loads(content))) or {}

    def _read(self, path: str, load: Callable[[bytes], T]) -> T | None:
        content = self.files.read(path)
        try:
            return None if content is None else load(content)
        except (ValueError, TypeError):  # damaged; among them errors of JSON, of UTF-8 and of pandas
            return None


def find_run(name: str, root: Path) -> Run:
    """The run that people mean by a name: an experiment, a branch, a tag, a commit, "workspace", or an MLflow run's id.

    Of two experiments with one name, that on top of HEAD. Raises UserError with what could have been meant.
    """
    if name == WORKSPACE:
        return Run(WORKSPACE, None, WorkspaceFiles(root))
    named = [(baseline, run) for baseline, run in _experiments(root) if run.name == name]
    if len(named) > 1:
        head = git(root, "rev-parse", "HEAD")
        named = [(baseline, run) for baseline, run in named if baseline == head] or named
    if len(named) > 1:
        commits = ", ".join(str(run.commit)[:7] for _, run in named)
        raise UserError(f"there are {len(named)} experiments {name!r}; name one by its commit: {commits}")
    if named:
        return named[0][1]
    commit = git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}") if name else None
    if commit is not None:
        is_hash = len(name) >= 7 and commit.startswith(name)
        return Run(commit[:7] if is_hash else name, commit, GitFiles(root, commit))
    if MLFLOW_ID.fullmatch(name):
        return _mlflow_run(name, root)
    known = [WORKSPACE, *(run.name for _, run in _experiments(root)), *_branches_and_tags(root)]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "`dvc exp show` lists the experiments"
    raise UserError(f"there is no experiment, branch, tag, commit or MLflow run {name!r}; {hint}")


def experiments(root: Path) -> list[Run]:
    """All DVC experiments of the repository, sorted by name. Empty outside of a repository."""
    return [run for _, run in _experiments(root)]


def differing_params(runs: Iterable[Run]) -> list[str]:
    """The dotted names of the params that differ between runs, in their order; without `runtime`."""
    flat = [flat_params(run) for run in runs]
    names = {name: None for params in flat for name in params}  # a set that keeps the order
    return [name for name in names if any(params.get(name) != flat[0].get(name) for params in flat)]


def flat_params(run: Run) -> dict[str, Any]:
    """The params of a run by their dotted names, without `runtime`."""
    return {
        f"{section}.{key}": value
        for section, values in run.params.items()
        if section not in NO_RESULT_SECTIONS
        for key, value in values.items()
    }


def _experiments(root: Path) -> list[tuple[str, Run]]:
    """The commit below each experiment, and its run; sorted by name."""
    lines = (git(root, "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps") or "").splitlines()
    found = []
    for line in lines:
        commit, _, ref = line.partition(" ")
        if match := EXPERIMENT_REF.fullmatch(ref):
            first, rest, name = match.groups()
            found.append((first + rest, Run(name, commit, GitFiles(root, commit))))
    return sorted(found, key=lambda each: each[1].name)


def _branches_and_tags(root: Path) -> list[str]:
    return (git(root, "for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/tags") or "").splitlines()


def _mlflow_run(run_id: str, root: Path) -> Run:
    tracking_uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not tracking_uri:
        database = root / "mlflow.db"
        if not database.is_file():
            raise UserError(f"there is no MLflow run {run_id}: {database} does not exist")
        tracking_uri = f"sqlite:///{database.absolute()}"
    files = MlflowFiles(run_id, tracking_uri)
    try:
        run = files.run
    except Exception as error:  # of MLflow, of its database, or of the network
        raise UserError(f"MLflow has no run {run_id} ({one_line(error)})") from None
    return Run(run.info.run_name or run_id, run.data.tags.get("git.commit"), files)


def _mapping(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise TypeError("expected keys and values")
    return content


def _numbers(content: bytes) -> dict[str, float]:
    return {
        key: value
        for key, value in _mapping(json.loads(content)).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
