import subprocess
import time

import pytest

from gpt2.errors import Interrupted
from stages import tracking
from stages.params import load_params
from tests.conftest import ROOT


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder of its own for the database, as DVC sets it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for variable in tracking.IMPATIENCE:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    return tmp_path


@pytest.fixture
def params():
    return load_params(ROOT / "params.yaml")


def client(project):
    import mlflow

    return mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")


def with_seed(params, seed):
    from dataclasses import replace

    return replace(params, evaluate=replace(params.evaluate, seed=seed))


def test_stages_share_one_run_and_other_params_get_a_child(project, params, tmp_path):
    (tmp_path / "report.md").write_text("hello")
    with tracking.open_run(params) as run:
        for step in (10, 20):
            run.metrics(step, {"train/loss": 3.5 - step / 10, "val/loss": None if step == 10 else 2.0})
        run.tags({"model.sha256": "abc"})
    with tracking.open_run(params, run.id) as later:
        later.metrics(0, {"evaluate/loss": 2.5})
        later.files([tmp_path / "report.md"], "reports")
    assert later.id == run.id

    found = client(project).get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {"train/loss": 1.5, "val/loss": 2.0, "evaluate/loss": 2.5}
    assert found.data.params["train.learning_rate"] == str(params.train.learning_rate)
    assert found.data.params["model.n_layer"] == "4"
    assert not [key for key in found.data.params if key.startswith("runtime")]
    assert found.data.tags["model.sha256"] == "abc"
    assert (project / "mlartifacts" / run.id / "artifacts/reports/report.md").read_text() == "hello"
    assert client(project).get_experiment(found.info.experiment_id).name == "gpt2"

    # a run that goes on logs no step twice
    with tracking.open_run(params, run.id) as resumed:
        resumed.skip_logged("train/loss")
        for step in (10, 20, 30):
            resumed.metrics(step, {"train/loss": 9.0})
    history = client(project).get_metric_history(run.id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(10, 2.5), (20, 1.5), (30, 9.0)]

    with tracking.open_run(with_seed(params, 99), run.id) as child:
        pass
    assert child.id != run.id
    tags = client(project).get_run(child.id).data.tags
    assert tags[tracking.PARENT_TAG] == run.id
    assert client(project).get_run(run.id).data.params["evaluate.seed"] == "1"
    with tracking.open_run(with_seed(params, 99), run.id) as next_stage:
        pass
    assert next_stage.id == child.id

    with tracking.open_run(params, "0" * 32) as other:
        pass
    assert client(project).get_run(other.id).data.tags["continues"] == "0" * 32

    with pytest.raises(Interrupted), tracking.open_run(params) as killed:
        raise Interrupted("stop", 15)
    with pytest.raises(ValueError, match="x"), tracking.open_run(params) as failed:
        raise ValueError("x")
    assert [client(project).get_run(r.id).info.status for r in (killed, failed)] == ["KILLED", "FAILED"]


def test_a_server_that_is_not_there_costs_a_warning_and_seconds(project, params, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    started_s = time.monotonic()
    with tracking.open_run(params, "some-id") as run:
        run.metrics(1, {"train/loss": 1.0})
        run.tags({"a": "b"})
    assert time.monotonic() - started_s < 30
    assert run.id == "some-id"  # not forgotten, for a later stage that may reach the server again
    error = capsys.readouterr().err
    assert error.count("WARNING: MLflow cannot be used") == 1
    assert error.count("\n") == 1


def test_a_store_that_breaks_during_a_run_costs_a_warning(project, params, capsys):
    class Broken:
        def log_batch(self, *_, **__):
            raise RuntimeError("disk\nfull")

    run = tracking.Run(Broken(), "id")
    run.metrics(1, {"train/loss": 1.0})
    run.metrics(2, {"train/loss": 1.0})
    assert capsys.readouterr().err == (
        "WARNING: MLflow does not answer (RuntimeError: disk full); going on without it, the results are in reports/\n"
    )


def test_tags_name_commit_and_experiment(project, monkeypatch):
    assert tracking.git_tags() == {}  # no repository, no tags
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@example.org"]
    (project / "code.py").write_text("x = 1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setenv("DVC_EXP_NAME", "warm-tide")
    tags = tracking.git_tags()
    assert len(tags["git.commit"]) == 40
    assert (tags["git.dirty"], tags["dvc.experiment"]) == ("false", "warm-tide")
    (project / "reports").mkdir()
    (project / "reports/metrics.json").write_text("{}")
    assert tracking.git_tags()["git.dirty"] == "false"  # results are not changes
    (project / "code.py").write_text("x = 2")
    assert tracking.git_tags()["git.dirty"] == "true"
