"""What is recorded of a run that is to be trained again: its commit, params, environment and sums."""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.files import GitFiles, MlflowFiles, git
from experiments.runs import Run, experiments, find_run, flat_params
from gpt2.errors import UserError
from stages import paths
from stages.environment import ENVIRONMENT_FILE, read_sessions
from stages.process import redact_secrets
from stages.tracking.description import MAX_PARAM_CHARACTERS

ENVIRONMENT = (paths.TRAIN_REPORT / ENVIRONMENT_FILE).as_posix()
SUM_TAGS = {"corpus": "corpus.sha256", "train_tokens": "tokens.sha256", "model": "model.sha256"}
"""MLflow's tags with sums, by the names of environment.json."""
MAX_COMMITS = 2000


@dataclass(frozen=True)
class Recorded:
    """A run that can be trained again.

    commit: to check out. params: that replace those of the commit's params.yaml, by section. sessions: the
    environments in which it was trained; empty for earlier versions. sums: SHA-256, by the names of environment.json.
    has_lock: whether the commit's dvc.lock is that of the run. origin: where all this is from, for a message.
    """

    run: Run
    commit: str
    params: Mapping[str, Mapping[str, Any]]
    sessions: list[dict[str, Any]]
    sums: dict[str, str]
    has_lock: bool
    origin: str

    @property
    def environment(self) -> dict[str, Any]:
        """The environment of the last session; of earlier versions, what reports/train/metrics.json says of it."""
        return self.sessions[-1] if self.sessions else _read_metrics(self.run)


def find_recorded(name: str, root: Path) -> Recorded:
    """Finds a run and what is recorded of it. Raises UserError if it cannot be trained again."""
    found = find_run(name, root)
    if isinstance(found.files, MlflowFiles):
        return _of_mlflow(found, found.files, root)
    if found.commit is None:
        raise UserError("the workspace has no commit; `dvc exp save` makes an experiment of it, which has one")
    return _of_commit(found, found.commit, "the run whose results it holds")


def _of_commit(run: Run, commit: str, origin: str) -> Recorded:
    if not _read_metrics(run):
        raise UserError(
            f"{run.name} holds no results of a training: its commit {commit[:7]} has no reports/train/metrics.json"
        )
    sessions = _read_sessions(run)
    return Recorded(run, commit, {}, sessions, _sums(sessions), has_lock=True, origin=origin)


def _of_mlflow(run: Run, files: MlflowFiles, root: Path) -> Recorded:
    """The commit that holds the run's results, or the one that it started from, with MLflow's params."""
    tags, run_id = files.run.data.tags, files.run_id
    if "model.sha256" not in tags:
        raise UserError(
            f"MLflow's run {run_id} has no trained model (tag model.sha256): it has not ended, it trained nothing, or "
            "`make sync` has to deliver the rest of it"
        )
    for commit in _commits_with_environment(root):
        at = Run(run.name, commit, GitFiles(root, commit))
        if at.environment.get("mlflow_run_id") == run_id or at.environment.get("run_id") == tags.get("pipeline.run_id"):
            return _of_commit(at, commit, f"which holds the results of MLflow's run {run_id}")
    for experiment in experiments(root):
        if experiment.name == tags.get("dvc.experiment") and experiment.commit and _has_params(experiment, files):
            return _of_commit(experiment, experiment.commit, f"the experiment of MLflow's run {run_id}")
    commit = tags.get("git.commit")
    if commit is None:
        raise UserError(f"MLflow's run {run_id} has no tag git.commit: it was trained outside of a git repository")
    if git(root, "cat-file", "-e", f"{commit}^{{commit}}") is None:
        raise UserError(
            f"commit {commit[:7]} of MLflow's run {run_id} is not in this repository; try `git fetch --all`"
        )
    if tags.get("git.dirty") == "true":
        raise UserError(
            f"MLflow's run {run_id} was trained with changes on top of commit {commit[:7]} that no commit and no "
            "experiment holds, so its code is lost; next time, use `dvc exp run`, or `dvc exp save` after a run"
        )
    params = params_of_mlflow(files.run.data.params, Run("", commit, GitFiles(root, commit)))
    sessions = _read_sessions(run)
    sums = _sums(sessions) or {
        name: tags[tag] for name, tag in SUM_TAGS.items() if tags.get(tag, "unknown") != "unknown"
    }
    return Recorded(run, commit, params, sessions, sums, has_lock=False, origin="with the params that MLflow has")


def params_of_mlflow(logged: Mapping[str, str], commit: Run) -> dict[str, dict[str, Any]]:
    """The params that MLflow has as text and that differ from a commit's, by section.

    Raises UserError if a text is not the whole value: secrets are not logged, and long values are cut.
    """
    params: dict[str, dict[str, Any]] = {}
    for name, text in logged.items():
        section, _, key = name.partition(".")
        known = commit.params.get(section, {})
        if key in known and redact_secrets(str(known[key]))[:MAX_PARAM_CHARACTERS] == text:
            continue
        if "***" in text or len(text) >= MAX_PARAM_CHARACTERS:
            raise UserError(f"MLflow has only a part of {name}, and the run's commit has another value: {text[:80]}")
        try:
            value = ast.literal_eval(text)  # the text is str(value)
        except (ValueError, SyntaxError):
            value = text
        params.setdefault(section, {})[key] = value
    return params


def _has_params(experiment: Run, files: MlflowFiles) -> bool:
    flat = {name: redact_secrets(str(value)) for name, value in flat_params(experiment).items()}
    return all(flat.get(name) == text for name, text in files.run.data.params.items())


def _commits_with_environment(root: Path) -> list[str]:
    """The commits, also of experiments, that changed environment.json; the newest first."""
    log = git(root, "log", "--all", f"--max-count={MAX_COMMITS}", "--format=%H", "--", ENVIRONMENT)
    return (log or "").splitlines()


def _sums(sessions: list[dict[str, Any]]) -> dict[str, str]:
    sums = sessions[-1].get("sha256", {}) if sessions else {}
    return {str(name): str(value) for name, value in sums.items() if value}


def _read_sessions(run: Run) -> list[dict[str, Any]]:
    try:
        return read_sessions(run.files.read(ENVIRONMENT) or b"")
    except ValueError:
        return []


def _read_metrics(run: Run) -> dict[str, Any]:
    try:
        content = json.loads(run.files.read((paths.TRAIN_REPORT / "metrics.json").as_posix()) or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
