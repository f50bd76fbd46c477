"""`python -m gpt2 reproduce` on trained runs. What is read of a run beforehand is tested in test_recorded.py."""

import json
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress

import psutil
import pytest

from gpt2.files import sha256_of
from tests.project import Project

pytestmark = pytest.mark.slow
REPRODUCE = ("python", "-m", "gpt2", "reproduce")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A trained run in a commit, and an experiment on top of it."""
    project = Project(tmp_path_factory.mktemp("project"))
    project.run("dvc", "repro", "train")
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "run")
    project.run("dvc", "exp", "run", "--temp", "--name", "longer", "-S", "train.max_steps=16", "train")
    return project


@contextmanager
def nothing_left_behind(project):
    """The user's files, the checkouts and MLflow are as before, after the block."""
    before = contents(project), len(project.runs())
    yield
    assert (contents(project), len(project.runs())) == before
    assert len(project.run("git", "worktree", "list").splitlines()) == 1
    assert not (project.folder / ".dvc/tmp/reproduce").exists()


def reproduce(project, *arguments, code=0):
    with nothing_left_behind(project):
        return project.run(*REPRODUCE, *arguments, code=code)


def contents(project):
    """The files of the user's tree, the ignored ones too, with their times; without git's and DVC's own."""
    files = [path for path in project.folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {
        path: path.stat().st_mtime_ns
        for path in files
        if path.relative_to(project.folder).parts[0]
        not in (".git", ".dvc", "mlflow.db", "mlflow.db-shm", "mlflow.db-wal")
    }


def test_an_experiment_ends_with_the_same_bits(project, tmp_path):
    kept = tmp_path / "kept"
    output = reproduce(project, "longer", "--keep", str(kept))
    assert "same bits: the weights of longer have SHA-256 " in output
    assert "step     16 of 16" in output  # it trained, though a checkpoint is complete
    assert sha256_of(kept / "model.safetensors") in output
    assert "WARNING" not in output
    assert "exists already" in reproduce(project, "longer", "--keep", str(kept), code=2)


def test_a_dry_run_trains_nothing(project):
    output = reproduce(project, "main", "--dry-run")
    assert "the tokens are in DVC's cache" in output
    assert sha256_of(project.folder / "models/model.safetensors") in output
    assert "step" not in output


def test_other_bits_are_told_with_the_first_step_and_the_reason(project):
    """Somebody else's results: another loss at step 8, and another version of torch."""
    reports = project.folder / "reports/train"
    sessions = json.loads((reports / "environment.json").read_text())
    sessions[-1]["sha256"]["model"] = "0" * 64
    sessions[-1]["versions"]["torch"] = "2.0.1"
    (reports / "environment.json").write_text(json.dumps(sessions))
    rows = (reports / "history.csv").read_text()
    (reports / "history.csv").write_text(re.sub(r"^8,[^,]*", "8,9.5", rows, flags=re.MULTILINE))
    project.run("git", "checkout", "-qb", "theirs")
    project.run("git", "commit", "-qam", "theirs")
    project.run("git", "checkout", "-q", "main")
    output = reproduce(project, "theirs", code=1)
    assert re.search(r"here, other bits are likely: torch \S+ instead of 2.0.1", output)
    assert re.search(r"different bits: model.safetensors has SHA-256 \w+, that of theirs 0000", output)
    assert re.search(r"the first difference: step 8, train_loss 9\.[0-9]+ instead of 9\.5\n", output)
    assert re.search(r"why: torch \S+ instead of 2.0.1\n", output)


def test_results_that_other_code_made_are_refused(project):
    source = project.folder / "gpt2/training/loss.py"
    source.write_text(source.read_text() + "# changed\n")
    project.run("git", "checkout", "-qb", "changed")
    project.run("git", "commit", "-qam", "changed")
    project.run("git", "checkout", "-q", "main")
    output = reproduce(project, "changed", "--dry-run", code=2)
    assert "made by other files than commit" in output
    assert "(gpt2/training)" in output


def started(project, name):
    """The command, as soon as its train stage lives; and that stage."""
    command = subprocess.Popen(
        [*REPRODUCE, name], cwd=project.folder, env=project.environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while True:
        assert command.poll() is None
        assert time.monotonic() < deadline
        for child in psutil.Process(command.pid).children():
            with suppress(psutil.Error):  # it has ended
                if "stages.train" in child.cmdline():
                    time.sleep(1)
                    return command, child
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing_behind(project, number):
    with nothing_left_behind(project):
        command, stage = started(project, "longer")
        command.send_signal(number)
        assert "error: interrupted by" in command.stderr.read()
        assert command.wait(timeout=60) == 128 + number
        assert not stage.is_running()


def test_what_a_killed_one_left_is_deleted_by_the_next(project):
    command, stage = started(project, "longer")
    command.kill()
    command.wait()
    stage.wait(timeout=60)
    (left,) = (project.folder / ".dvc/tmp/reproduce").iterdir()
    reproduce(project, "longer", "--dry-run")
    assert not left.exists()


def test_an_mlflow_run_whose_results_were_not_committed(project):
    before = {run.info.run_id for run in project.runs()}
    project.change(train={"seed": 11})
    project.run("python", "-m", "stages.train")
    project.run("python", "-m", "stages.sync")  # on a busy machine, MLflow does not have everything at once
    (run,) = [run for run in project.runs() if run.info.run_id not in before]
    project.run("git", "checkout", "-q", "params.yaml", "reports")
    project.run("dvc", "checkout", "-q", "--force", "models")
    output = reproduce(project, run.info.run_id)
    assert "with the params that MLflow has" in output
    assert f"same bits: the weights of {run.info.run_name} have SHA-256 {run.data.tags['model.sha256']}" in output
    assert run.data.tags["model.sha256"] != sha256_of(project.folder / "models/model.safetensors")


def test_without_dvcs_cache_the_tokens_are_made_from_the_text_if_it_is_the_same(project, tmp_path):
    shutil.move(project.folder / ".dvc/cache/files", tmp_path / "files")
    text = project.folder / "mine.txt"
    output = reproduce(project, "main")
    assert "making the tokens from the text" in output
    assert "same bits" in output
    shutil.copy(text, tmp_path / "mine.txt")
    text.write_text(text.read_text() + "One more line.\n")
    changed = reproduce(project, "main", code=2)
    assert re.search(r"error: the text has changed: its SHA-256 is \w{64}, and the run's has SHA-256 \w{64}; ", changed)
    text.unlink()
    gone = reproduce(project, "main", code=2)
    assert re.search(r"error: the text of the run is gone, and the run's has SHA-256 \w{64}: ", gone)
    assert "step" not in changed + gone
    shutil.move(tmp_path / "mine.txt", text)
    shutil.move(tmp_path / "files", project.folder / ".dvc/cache/files")
