"""A worker's own clone of the repository, in which its trials run, and the experiments that it leaves in ours.

`dvc exp run --temp` makes a copy for each trial, and writes to the workspace meanwhile. A worker makes one copy and
keeps it: data/tokens stays there, the user's workspace is never touched, and workers do not meet. It lies where DVC's
temporary copies lie, so that the stages find the repository (`stages.paths.real_root`).

An experiment is a commit on the commit that the sweep started from, under the ref that DVC gives it. It has
params.yaml, dvc.lock and reports/ of the trial, so `dvc exp show`, `apply` and `diff` treat it like any other.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from gpt2.errors import FileError, UserError
from gpt2.files import atomic_path
from stages.paths import EVALUATE_REPORT, LINKED, PARAMS

REPORTS = "reports"
AUTHOR = "sweep"


def git(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """What git prints. Raises FileError with git's message."""
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, env={**os.environ, **(environment or {})}
    )
    if done.returncode:
        raise FileError(f"git {arguments[0]} failed in {folder}: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout.strip()


def repository_root() -> Path:
    """The current folder, if it is the root of a repository with this pipeline. Raises UserError."""
    root = Path.cwd()
    if not (root / "dvc.yaml").is_file() or not (root / ".git").exists():
        raise UserError(f"{root} is not the root of the project's repository: change to its folder, and try again")
    return root


def snapshot_ref(name: str) -> str:
    """The ref that keeps what a sweep started from."""
    return f"refs/sweeps/{name}"


def take_snapshot(root: Path, name: str) -> dict[str, str]:
    """Keeps the commit and the tracked files of the workspace as they are now, without changing anything.

    Returns base: the commit, and snapshot: a commit with the changed files, too.
    """
    base = git(root, "rev-parse", "HEAD")
    snapshot = git(root, "stash", "create", environment=_author(root)) or base
    git(root, "update-ref", snapshot_ref(name), snapshot)
    return {"base": base, "snapshot": snapshot}


def require_snapshot(root: Path, name: str, definition: Mapping[str, Any]) -> None:
    """Raises UserError if this repository does not have what the study started from, as on another machine."""
    for commit in (definition["snapshot"], definition["base"]):
        if subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=root, capture_output=True).returncode:
            raise UserError(
                f"the sweep {name!r} started from commit {commit[:10]}, which is not here: fetch it with git. A sweep "
                "that several machines share has to start from a commit, without changes in the workspace"
            )


def experiments_of(root: Path, name: str) -> list[str]:
    """The names of the experiments of trials that a sweep of this name left."""
    refs = git(root, "for-each-ref", "--format=%(refname)", "refs/exps/").splitlines()
    names = {ref.rpartition("/")[2] for ref in refs}
    return sorted(each for each in names if each.rpartition("-")[0] == name and each.rpartition("-")[2].isdigit())


@dataclass(frozen=True)
class Clone:
    """A worker's clone. root: the repository. base, snapshot: as `take_snapshot` returns them."""

    root: Path
    folder: Path
    base: str
    snapshot: str

    def prepare(self) -> None:
        """Makes the clone, or brings it back to the snapshot, whatever a killed worker left."""
        if not (self.folder / ".git/HEAD").is_file():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            git(self.root, "clone", "-q", "--shared", "--no-checkout", "--no-tags", str(self.root), str(self.folder))
        for lock in ("index.lock", "HEAD.lock"):
            (self.folder / ".git" / lock).unlink(missing_ok=True)
        git(self.folder, "update-ref", "--no-deref", "HEAD", self.base)  # detached; objects are shared
        self.reset()
        local = self.root / ".dvc/config.local"
        target = self.folder / ".dvc/config.local"
        target.write_text(
            (local.read_text(encoding="utf-8") if local.is_file() else "") + f"\n[cache]\n    dir = {self._cache()}\n",
            encoding="utf-8",
        )
        links = self.folder / LINKED
        for link in (self.root / LINKED).iterdir() if (self.root / LINKED).is_dir() else ():
            if link.is_symlink() and not (links / link.name).is_symlink():
                links.mkdir(parents=True, exist_ok=True)
                (links / link.name).symlink_to(os.readlink(link))

    def _cache(self) -> Path:
        """The folder of DVC's cache; that of the repository may be configured elsewhere."""
        done = subprocess.run(["dvc", "cache", "dir"], cwd=self.root, capture_output=True, text=True)
        return Path(done.stdout.strip() or self.root / ".dvc/cache").absolute()

    def reset(self) -> None:
        """The tracked files of the snapshot."""
        git(self.folder, "read-tree", "--reset", "-u", self.snapshot)

    def write_params(self, values: Mapping[str, Any]) -> None:
        """params.yaml with other values. values: by `section.key`. Comments stay."""
        round_trip = YAML()
        content = round_trip.load((self.folder / PARAMS).read_text(encoding="utf-8"))
        for name, value in values.items():
            section, _, key = name.partition(".")
            content[section][key] = value
        with atomic_path(self.folder / PARAMS) as temporary, temporary.open("w", encoding="utf-8") as file:
            round_trip.dump(content, file)

    def forget_reports(self, stage: str) -> None:
        """Deletes the reports of the snapshot that the trial does not write: they tell of another model."""
        if stage != "evaluate":
            shutil.rmtree(self.folder / EVALUATE_REPORT, ignore_errors=True)

    def save_experiment(self, name: str, message: str) -> str:
        """Makes an experiment of the files as they are. Returns its commit."""
        git(self.folder, "add", "--update")
        git(self.folder, "add", "--force", "--", *self._existing(REPORTS, "dvc.lock"))
        tree = git(self.folder, "write-tree")
        author = _author(self.root)
        commit = git(self.folder, "commit-tree", tree, "-p", self.base, "-m", message, environment=author)
        ref = f"refs/exps/{self.base[:2]}/{self.base[2:]}/{name}"
        git(self.folder, "update-ref", ref, commit)
        git(self.root, "fetch", "-q", "--no-write-fetch-head", str(self.folder), f"+{ref}:{ref}")
        return commit

    def _existing(self, *names: str) -> Sequence[str]:
        return [name for name in names if (self.folder / name).exists()]

    def environment(self, experiment: str | None = None, parent_run: str | None = None) -> dict[str, str]:
        """For programs that run in the clone. parent_run: MLflow's id of the run whose child this is."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("DVC_EXP_")}
        if experiment is not None:
            environment |= {"DVC_EXP_NAME": experiment, "DVC_EXP_BASELINE_REV": self.base}
        if parent_run is not None:
            environment["GPT2_PARENT_RUN_ID"] = parent_run
        return environment


def clone_folder(root: Path, name: str, slot: int) -> Path:
    """Where the clone of a worker lies."""
    return root / f".dvc/tmp/exps/sweep-{name}-{slot}"


def _author(root: Path) -> dict[str, str]:
    """An author for commits, where git has none."""
    done = subprocess.run(["git", "config", "user.email"], cwd=root, capture_output=True, text=True)
    if done.stdout.strip() or "GIT_COMMITTER_EMAIL" in os.environ:
        return {}
    parts = {"NAME": AUTHOR, "EMAIL": f"{AUTHOR}@localhost"}
    return {f"GIT_{who}_{part}": value for who in ("AUTHOR", "COMMITTER") for part, value in parts.items()}
