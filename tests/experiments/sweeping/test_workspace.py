"""A worker's clone: it starts from what the workspace was, leaves experiments, and changes nothing else."""

import json
import subprocess

import pytest

from experiments.sweeping.workspace import Clone, experiments_of, git, require_snapshot, take_snapshot
from gpt2.errors import FileError, UserError


@pytest.fixture
def repository(tmp_path, monkeypatch):
    root = tmp_path / "repository"
    (root / "reports/train").mkdir(parents=True)
    (root / "reports/evaluate").mkdir()
    (root / ".dvc").mkdir()
    (root / ".dvc/.gitignore").write_text("/tmp\n/config.local\n")
    (root / "params.yaml").write_text("# all params\ntrain:\n  seed: 1 # of the weights\n  beta1: 0.9\n")
    (root / "reports/train/metrics.json").write_text("{}")
    (root / "reports/evaluate/metrics.json").write_text("{}")
    for name in ("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
        monkeypatch.delenv(name, raising=False)
    for command in (["init", "-q", "-b", "main"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    author = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    subprocess.run(["git", *author, "commit", "-qm", "start"], cwd=root, check=True)
    return root


def clone_of(root):
    clone = Clone(root, root / ".dvc/tmp/exps/sweep-x-0", **take_snapshot(root, "x"))
    clone.prepare()
    return clone


def test_a_clone_has_the_edits_of_the_workspace_when_the_sweep_began(repository):
    (repository / "params.yaml").write_text("train:\n  seed: 5\n  beta1: 0.9\n")
    clone = clone_of(repository)
    (repository / "params.yaml").write_text("train:\n  seed: 6\n")
    clone.reset()
    assert "seed: 5" in (clone.folder / "params.yaml").read_text()
    assert git(repository, "stash", "list") == ""
    assert git(repository, "status", "--porcelain") == "M params.yaml"


def test_an_experiment_has_the_params_and_reports_of_its_trial(repository):
    clone = clone_of(repository)
    clone.write_params({"train.seed": 7})
    clone.forget_reports("train")
    (clone.folder / "reports/train/metrics.json").write_text(json.dumps({"best_val_loss": 3.5}))
    (clone.folder / "reports/train/validation.csv").write_text("step,val_loss\n")
    commit = clone.save_experiment("x-003", "x-003: 3.5")

    assert git(repository, "rev-parse", f"{commit}^") == git(repository, "rev-parse", "main")
    assert git(repository, "show", f"{commit}:params.yaml").startswith(
        "# all params\ntrain:\n  seed: 7 # of the weights"
    )
    files = git(repository, "ls-tree", "-r", "--name-only", commit).split()
    assert "reports/train/validation.csv" in files
    assert "reports/evaluate/metrics.json" not in files  # it told of the model before
    assert experiments_of(repository, "x") == ["x-003"]
    assert experiments_of(repository, "y") == []
    assert git(repository, "status", "--porcelain") == ""
    clone.reset()
    assert (clone.folder / "reports/evaluate/metrics.json").is_file()


def test_a_clone_is_whole_again_after_a_kill(repository):
    clone = clone_of(repository)
    (clone.folder / ".git/index.lock").write_text("")
    (clone.folder / "params.yaml").unlink()
    clone.prepare()
    assert (clone.folder / "params.yaml").is_file()


def test_what_the_sweep_started_from_has_to_be_here(repository):
    require_snapshot(repository, "x", take_snapshot(repository, "x"))
    with pytest.raises(UserError, match="started from commit 0123012301, which is not here: fetch it with git"):
        require_snapshot(repository, "x", {"base": "0123" * 10, "snapshot": "0123" * 10})
    with pytest.raises(FileError, match="git rev-parse failed in"):
        git(repository, "rev-parse", "--verify", "nothing")
