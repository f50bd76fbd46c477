"""A temporary checkout of a commit, a git worktree in .dvc/tmp/reproduce/, and programs that run in it.

The user's own tree is not touched. The checkout shares DVC's cache with it. It is deleted at the end, also after an
error or a signal; that of a process that was killed is deleted by the next one.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.files import git
from gpt2.errors import BusyError, UserError
from gpt2.files import file_lock
from stages.process import StopSignal, echo

PLACE = Path(".dvc/tmp/reproduce")
POLL_S = 0.1
PATIENCE_S = 30.0
"""How long a program may live after a signal: a stage saves a checkpoint."""
NOT_PASSED_ON = ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_", "MLFLOW_", "GIT_", "GPT2_PARENT_", "TORCHELASTIC_", "PYTHONPATH")
"""Environment variables that say where a program runs or reports to."""
NO_TRACKING = "cannot write the record for MLflow"


@dataclass(frozen=True)
class Worktree:
    """The checkout.

    root: the user's repository. base: the folder that is deleted. folder: the project in the checkout. remotes: DVC's.
    """

    root: Path
    base: Path
    folder: Path
    stop: StopSignal
    remotes: tuple[str, ...] = ()

    def get(self, path: str) -> bool:
        """Takes an output of DVC from the cache. Returns whether it was there."""
        return self.dvc("checkout", "--quiet", "--force", path)[0] == 0

    def pull(self, path: str) -> bool:
        """Takes an output of DVC from the default remote. Returns whether it was there."""
        return self.dvc("pull", "--quiet", "--force", path)[0] == 0

    def changed(self, stage: str) -> list[str]:
        """What a stage depends on and differs from dvc.lock: files, and sections of params.yaml."""
        code, output = self.dvc("status", "--json", stage)
        try:
            found = json.loads(output)[stage] if code == 0 and output.strip() != "{}" else []
        except (ValueError, KeyError):
            raise UserError(f"`dvc status {stage}` does not work in that commit") from None
        names: list[str] = ["cmd in dvc.yaml"] if "changed command" in found else []
        for each in found:
            for path, state in (each.get("changed deps", {}) if isinstance(each, dict) else {}).items():
                names += [f"{path}: {key}" for key in state] if isinstance(state, dict) else [path]
        return names

    def run_stage(self, name: str, *, sees_root: bool = False) -> int:
        """Runs a stage, whose lines are printed, without MLflow. Returns its exit code.

        sees_root: it finds the user's own texts and downloads, as in `dvc exp run --temp`.
        """
        # a file in the place of the folder of records switches tracking off, also in earlier versions of the code
        outbox = self.folder / "mlflow-outbox"
        outbox.touch()
        variables = {"DVC_STAGE": name, **({"DVC_ROOT": str(self.root)} if sees_root else {})}
        command = [sys.executable, "-m", f"stages.{name}"]
        return self._run(command, self.folder, variables, _print_line, stderr=subprocess.PIPE)

    def dvc(self, *arguments: str, folder: Path | None = None) -> tuple[int, str]:
        """Runs a command of DVC in the checkout, or in another folder. Returns its exit code and output."""
        lines: list[str] = []
        # DVC keeps a cache for each folder; that of the checkout would stay behind
        variables = {} if folder else {"DVC_SITE_CACHE_DIR": str(self.base / "dvc")}
        command = [sys.executable, "-m", "dvc", *arguments]
        code = self._run(command, folder or self.folder, variables, lines.append, stdout=subprocess.PIPE)
        return code, "\n".join(lines)

    def _run(
        self,
        command: list[str],
        folder: Path,
        variables: Mapping[str, str],
        read: Callable[[str], object],
        *,
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
    ) -> int:
        """Runs a program, and passes each line of its pipe to a function. Raises Interrupted after a signal."""
        self.stop.check()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_PASSED_ON)}
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**kept, **variables},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            errors="replace",
        )
        output = process.stdout or process.stderr
        assert output is not None
        reader = threading.Thread(target=lambda: [read(line.rstrip("\n")) for line in output], daemon=True)
        reader.start()
        try:
            while process.poll() is None and not self.stop:
                time.sleep(POLL_S)
        finally:
            _end(process)
        self.stop.check()
        reader.join(PATIENCE_S)
        return process.returncode


@contextmanager
def temporary_worktree(root: Path, commit: str, stop: StopSignal) -> Iterator[Worktree]:
    """A checkout of a commit, for the block. Raises UserError if git cannot make it."""
    _delete_leftovers(root)
    base = (root / PLACE / uuid.uuid4().hex[:12]).absolute()

    def delete() -> None:
        git(root, "worktree", "remove", "--force", "--force", str(base / "tree"))
        shutil.rmtree(base, ignore_errors=True)
        git(root, "worktree", "prune")
        with suppress(OSError):  # others are in it
            base.parent.rmdir()

    def delete_and_end(number: int) -> int:
        delete()
        return 128 + number

    stop.end = delete_and_end
    try:
        with file_lock(base / "lock"):
            # hooks are for the user's own checkouts
            command = ["-c", "core.hooksPath=/dev/null", "worktree", "add", "--detach", str(base / "tree"), commit]
            if git(root, *command) is None:
                raise UserError(f"git cannot check out {commit[:7]} in {base}; try `git worktree add` for its message")
            folder = base / "tree" / (git(root, "rev-parse", "--show-prefix") or "")
            if not (folder / ".dvc").is_dir():
                raise UserError(f"commit {commit[:7]} has no DVC pipeline")
            yield _with_users_settings(Worktree(root, base, folder, stop))
    finally:
        delete()


def _with_users_settings(worktree: Worktree) -> Worktree:
    """Gives the checkout the user's cache and remotes, which its commit may not know, by a .dvc/config.local.

    DVC lists settings with absolute paths. They may hold credentials; the file is deleted with the checkout.
    """
    (code, listed), (other, cache) = (
        worktree.dvc(*command, folder=worktree.root) for command in (("config", "--list"), ("cache", "dir"))
    )
    if code or other:
        raise UserError(f"DVC does not work in {worktree.root}; `dvc config --list` says why")
    sections: dict[str, dict[str, str]] = {"cache": {"dir": cache.strip()}}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section.startswith("remote."):
            section = f"'remote \"{section.removeprefix('remote.')}\"'"
        elif name not in ("core.remote", "cache.type"):
            continue
        sections.setdefault(section, {})[key] = value
    lines = (
        line
        for section, values in sections.items()
        for line in (f"[{section}]", *(f'{key} = "{value}"' for key, value in values.items()))
    )
    path = worktree.folder / ".dvc/config.local"
    path.touch(mode=0o600)
    path.write_text("\n".join(lines), encoding="utf-8")
    names = tuple(section.split('"')[1] for section in sections if section.startswith("'remote"))
    return replace(worktree, remotes=names)


def _delete_leftovers(root: Path) -> None:
    """Deletes checkouts of processes that were killed."""
    for folder in (root / PLACE).glob("*/"):
        try:
            with file_lock(folder / "lock"):
                shutil.rmtree(folder, ignore_errors=True)
        except BusyError:
            continue
    git(root, "worktree", "prune")


def _print_line(line: str) -> None:
    if NO_TRACKING not in line:
        echo(f"  {line}")


def _end(process: "subprocess.Popen[Any]") -> None:
    """Ends a program that still runs."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
