"""How results come back from machines that are not kept, with the real DVC: dvc push there, dvc pull here."""

import os
import subprocess

import pytest

PIPELINE = """
stages:
  train:
    cmd: mkdir -p models reports && echo weights >models/model && echo '{"loss":1}' >reports/metrics.json
    outs:
      - models
    metrics:
      - reports/metrics.json:
          cache: false
"""


@pytest.fixture
def run():
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "GIT_"))}
    author = {f"GIT_{who}_{what}": "me@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def run(folder, *commands, succeeds=True):
        for command in commands:
            environment = {**kept, **author, "DVC_NO_ANALYTICS": "1"}
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            assert (done.returncode == 0) == succeeds, done.stdout + done.stderr
        return done.stdout

    return run


def test_models_and_reports_come_back(tmp_path, run):
    here, there, bucket = (tmp_path / name for name in ("here", "there", "bucket"))
    for folder in (here, bucket):
        folder.mkdir()
    (here / "dvc.yaml").write_text(PIPELINE)
    run(here, ["git", "init", "-q"], ["dvc", "init", "-q"])
    run(here, ["dvc", "remote", "default"], succeeds=False)
    run(here, ["dvc", "remote", "add", "--default", "store", str(tmp_path / "store")], ["dvc", "remote", "default"])
    run(here, ["git", "add", "-A"], ["git", "commit", "-qm", "start"], ["git", "clone", "-q", str(here), str(there)])
    # there, as launch/skypilot.yaml does: without the history of git
    (there / ".git").rename(tmp_path / "unused")
    run(there, ["git", "init", "-q"], ["dvc", "repro", "--pull"], ["dvc", "push"])
    run(there, ["tar", "-cf", str(bucket / "results.tar"), "dvc.lock", "reports"])
    run(here, ["tar", "-xf", str(bucket / "results.tar")], ["dvc", "pull"])
    assert (here / "models/model").read_text() == "weights\n"
    assert (here / "reports/metrics.json").exists()
    assert "up to date" in run(here, ["dvc", "status"])


def test_what_was_pushed_is_not_computed_again(tmp_path, run):
    here, node = tmp_path / "here", tmp_path / "node"
    here.mkdir()
    (here / "dvc.yaml").write_text(PIPELINE.partition("    metrics:")[0])
    run(here, ["git", "init", "-q"], ["dvc", "init", "-q"])
    run(
        here, ["dvc", "remote", "add", "--default", "store", str(tmp_path / "store")], ["dvc", "repro"], ["dvc", "push"]
    )
    run(here, ["git", "add", "-A"], ["git", "commit", "-qm", "pushed"], ["git", "clone", "-q", str(here), str(node)])
    assert "Running stage" not in run(node, ["dvc", "repro", "--pull"])
    assert (node / "models/model").read_text() == "weights\n"
