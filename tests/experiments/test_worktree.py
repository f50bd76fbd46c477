import subprocess
from dataclasses import replace

import pytest

from experiments.files import git
from experiments.worktree import PLACE, temporary_worktree
from gpt2.errors import Interrupted, UserError
from gpt2.files import file_lock
from tests.conftest import NeverStops
from tests.experiments.repository import Repository


@pytest.fixture
def repository(tmp_path):
    """A repository with DVC's folder, on top of it a remote with a relative path, and a hook."""
    repository = Repository(tmp_path / "repository")
    repository.write(".dvc/.gitignore", "/config.local\n/tmp\n/cache\n")
    repository.write(".dvc/config", "")
    repository.head = repository.commit("DVC")
    repository.write(".dvc/config", "[core]\n    remote = storage\n['remote \"storage\"']\n    url = ../../storage\n")
    repository.commit("remote")
    repository.write(".git/hooks/post-checkout", "#!/bin/sh\ntouch ran-a-hook\n")
    (repository.folder / ".git/hooks/post-checkout").chmod(0o755)
    repository.write(".dvc/config.local", "['remote \"storage\"']\n    jobs = 3\n")
    return repository


def checkouts(folder):
    return len(git(folder, "worktree", "list").splitlines()) - 1


def test_a_checkout_has_the_commit_the_cache_and_the_users_own_settings(repository):
    root = repository.folder
    repository.write("params.yaml", "changed")
    with temporary_worktree(root, repository.head, NeverStops()) as worktree:
        assert (worktree.folder / "params.yaml").read_text() == git(root, "show", "HEAD:params.yaml") + "\n"
        assert not (worktree.folder / "ran-a-hook").exists()
        assert worktree.remotes == ("storage",)
        command = ["dvc", "config", "--list"]
        settings = subprocess.run(command, cwd=worktree.folder, capture_output=True, text=True).stdout.splitlines()
        assert f"cache.dir={root / '.dvc/cache'}" in settings
        assert f"remote.storage.url={root.parent / 'storage'}" in settings
        assert "remote.storage.jobs=3" in settings
        assert "core.remote=storage" in settings
        assert checkouts(root) == 1
    assert (root / "params.yaml").read_text() == "changed"
    assert checkouts(root) == 0
    assert not (root / PLACE).exists()


def test_a_checkout_of_a_folder_of_a_repository(tmp_path):
    repository = Repository(tmp_path / "repository")
    repository.write("project/.dvc/config", "")
    commit = repository.commit("a project in a folder")
    with temporary_worktree(repository.folder / "project", commit, NeverStops()) as worktree:
        assert worktree.folder.name == "project"
        assert (worktree.folder / ".dvc/config").is_file()


@pytest.mark.parametrize(("commit", "message"), [("0" * 40, "git cannot check out 0000000"), (None, "no DVC pipeline")])
def test_a_commit_that_cannot_be_checked_out(tmp_path, commit, message):
    repository = Repository(tmp_path / "repository")
    with (
        pytest.raises(UserError, match=message),
        temporary_worktree(repository.folder, commit or repository.head, NeverStops()),
    ):
        pass
    assert checkouts(repository.folder) == 0


class Stops(NeverStops):
    def __bool__(self):
        return True

    def check(self):
        raise Interrupted("interrupted by SIGINT", 2)


def test_a_signal_deletes_the_checkout(repository):
    with (
        pytest.raises(Interrupted),
        temporary_worktree(repository.folder, repository.head, NeverStops()) as worktree,
    ):
        replace(worktree, stop=Stops()).get("data")
    assert checkouts(repository.folder) == 0


def test_checkouts_of_killed_processes_are_deleted_and_those_in_use_are_not(repository):
    root = repository.folder
    for name in ("killed", "in-use"):
        git(root, "worktree", "add", "--detach", str(root / PLACE / name / "tree"), repository.head)
    with (
        file_lock(root / PLACE / "in-use/lock"),
        temporary_worktree(root, repository.head, NeverStops()) as worktree,
    ):
        assert {path.name for path in (root / PLACE).iterdir()} == {"in-use", worktree.base.name}
    assert checkouts(root) == 1
