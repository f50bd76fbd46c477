import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2.errors import FileError, Interrupted
from gpt2.files import JsonLines
from stages import sync, tracking
from stages.params import load_params
from stages.tracking import RunIds, protocol, uploader
from tests.conftest import ROOT, NeverStops

IDS = RunIds("a" * 32, None)
STOP = NeverStops()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder of its own for database and outbox, as DVC sets it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for variable in uploader.SHORT_TIMEOUTS:
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
    return replace(params, evaluate=replace(params.evaluate, seed=seed))


def test_stages_share_one_run_and_other_params_get_a_child(project, params, tmp_path):
    (tmp_path / "report.md").write_text("hello")
    with tracking.start_run(params, "train", IDS, STOP) as run:
        for step in (10, 20):
            run.metrics(step, {"train/loss": 3.5 - step / 10, "val/loss": None if step == 10 else 2.0})
        run.tags({"model.sha256": "abc"})
    ids = run.ids()
    assert ids.run_id == IDS.run_id
    with tracking.start_run(params, "evaluate", ids, STOP) as later:
        later.metrics(0, {"evaluate/loss": 2.5})
        later.files([tmp_path / "report.md"], "reports")
    assert later.ids() == ids

    found = client(project).get_run(ids.mlflow_run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {"train/loss": 1.5, "val/loss": 2.0, "evaluate/loss": 2.5}
    assert found.data.params["train.learning_rate"] == str(params.train.learning_rate)
    assert found.data.params["model.n_layer"] == "4"
    assert not [key for key in found.data.params if key.startswith("runtime")]
    assert found.data.tags["model.sha256"] == "abc"
    artifacts = project / "mlartifacts" / ids.mlflow_run_id / "artifacts"
    assert (artifacts / "reports/report.md").read_text() == "hello"
    assert client(project).get_experiment(found.info.experiment_id).name == "gpt2"
    assert protocol.records() == []  # delivered

    # a resumed run logs no step twice, and a repeated evaluation logs nothing
    earlier = [tracking.metrics_event(step, {"train/loss": 9.0}) for step in (10, 20)]
    with tracking.start_run(params, "train", ids, STOP, events=earlier) as resumed:
        resumed.metrics(30, {"train/loss": 9.0})
    with tracking.start_run(params, "evaluate", ids, STOP) as again:
        again.metrics(0, {"evaluate/loss": 2.5})
    history = client(project).get_metric_history(ids.mlflow_run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(10, 2.5), (20, 1.5), (30, 9.0)]
    assert len(client(project).get_metric_history(ids.mlflow_run_id, "evaluate/loss")) == 1

    with tracking.start_run(with_seed(params, 99), "evaluate", ids, STOP) as child:
        child.metrics(0, {"evaluate/loss": 2.4})
    child_id = child.ids().mlflow_run_id
    assert child_id != ids.mlflow_run_id
    assert client(project).get_run(child_id).data.tags[protocol.PARENT_TAG] == ids.mlflow_run_id
    assert client(project).get_run(ids.mlflow_run_id).data.params["evaluate.seed"] == "1"
    with tracking.start_run(with_seed(params, 99), "export-to-space", ids, STOP) as next_stage:
        pass
    assert next_stage.ids().mlflow_run_id == child_id

    with tracking.start_run(params, "evaluate", RunIds("b" * 32, "0" * 32), STOP) as other:
        pass
    assert client(project).get_run(other.ids().mlflow_run_id).data.tags["continues"] == "0" * 32

    failed = leave_with(ValueError("x"), params, RunIds("c" * 32, None))
    assert client(project).get_run(failed.ids().mlflow_run_id).info.status == "FAILED"


class Stopped(NeverStops):
    def __bool__(self):
        return True


def leave_with(error, params, ids, stop=STOP):
    """A run whose stage ends with an error."""
    with suppress(type(error)), tracking.start_run(params, "train", ids, stop) as run:
        run.metrics(1, {"train/loss": 1.0})
        raise error
    return run


def test_an_interrupted_stage_is_logged_without_waiting(project, params):
    client(project).search_experiments()  # makes the database, which takes seconds
    started_s = time.monotonic()
    run = leave_with(Interrupted("stop", 15), params, IDS, Stopped())
    assert time.monotonic() - started_s < 1
    run._uploader.wait(timeout=20)
    sync.sync()
    (found,) = client(project).search_runs([client(project).get_experiment_by_name("gpt2").experiment_id])
    assert (found.info.status, found.data.metrics) == ("KILLED", {"train/loss": 1.0})


def test_undelivered_records_are_delivered_later(project, params, monkeypatch, capsys, tmp_path):
    (tmp_path / "report.md").write_text("hello")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    started_s = time.monotonic()
    with tracking.start_run(params, "train", IDS, STOP) as run:
        run.metrics(1, {"train/loss": 1.0})
        run.files([tmp_path / "report.md"], "reports")
    assert time.monotonic() - started_s < protocol.PATIENCE_S + 1
    assert run.ids() == IDS
    error = capsys.readouterr().err
    assert error.count("WARNING: MLflow does not") == 1
    assert "`python -m stages.sync`" in error
    assert error.count("\n") == 1

    (tmp_path / "report.md").unlink()  # the record has a copy
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for message in (f"{IDS.run_id}.train: delivered\n", "MLflow has everything\n"):
        result = subprocess.run([sys.executable, "-m", "stages.sync"], env=environment, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, message)
    (found,) = client(project).search_runs([client(project).get_experiment_by_name("gpt2").experiment_id])
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"train/loss": 1.0})
    assert (project / "mlartifacts" / found.info.run_id / "artifacts/reports/report.md").read_text() == "hello"


def test_a_lost_response_logs_no_step_twice(project, params, monkeypatch):
    folder = project / "mlflow-outbox" / f"{IDS.run_id}.train"
    protocol.Record(IDS.run_id, None, "train", 1, None, {}, {}, system_metrics=False).write()
    JsonLines(folder / "events.jsonl", [{"step": 1, "metrics": {"train/loss": 2.0}, "time_ms": 1}]).close()
    store = uploader.MlflowStore()
    upload = uploader.Uploader(folder, store)
    log_batch = store.client.log_batch

    def log_and_fail(*arguments, **options):
        log_batch(*arguments, **options)
        raise TimeoutError("no answer")

    monkeypatch.setattr(store.client, "log_batch", log_and_fail)
    with pytest.raises(TimeoutError):
        upload.deliver()
    monkeypatch.setattr(store.client, "log_batch", log_batch)
    upload.deliver()
    assert [metric.step for metric in client(project).get_metric_history(upload.run_id, "train/loss")] == [1]


def test_sync_reports_what_it_cannot_deliver(project, params, monkeypatch, capsys):
    folder = project / "mlflow-outbox/abc.train"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text("{")
    assert sync.sync() == 1
    assert "WARNING: abc.train: JSONDecodeError" in capsys.readouterr().err
    assert folder.exists()


def test_a_record_that_another_process_delivers_meanwhile_is_no_failure(project, params, monkeypatch, capsys):
    folder = project / "mlflow-outbox/abc.train"
    monkeypatch.setattr(sync, "records", lambda: [folder])  # as it was a moment ago
    assert sync.sync() == 0
    assert "WARNING" not in capsys.readouterr().err
    assert not folder.exists()


def test_a_record_that_cannot_be_written_is_a_warning(project, params, capsys):
    (project / "mlflow-outbox").write_text("no folder")
    with tracking.start_run(params, "train", IDS, STOP) as run:
        run.metrics(1, {"train/loss": 1.0})
        run.files([project / "mlflow-outbox"], "reports")
    error = capsys.readouterr().err
    assert error.startswith("WARNING: cannot write the record for MLflow")
    assert error.count("\n") == 1


def test_nothing_secret_is_recorded(project, params, monkeypatch):
    secret = replace(params, corpus=replace(params.corpus, source="https://me:s3cret@example.org/a.txt?key=s3cret"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@127.0.0.1:9")
    with tracking.start_run(secret, "train", IDS, STOP) as run:
        run.tags({"corpus.from": secret.corpus.source})
    files = [path for path in (project / "mlflow-outbox").rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if "s3cret" in path.read_text()]


def test_run_ids_are_read_from_the_trained_model(project):
    (project / "models").mkdir()
    (project / "models/run.json").write_text(json.dumps({"run_id": "a", "mlflow_run_id": None}))
    assert tracking.read_run_ids() == RunIds("a", None)
    (project / "models/run.json").write_text("{}")
    with pytest.raises(FileError, match="run the train stage again"):
        tracking.read_run_ids()


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


def test_a_run_has_datasets_a_table_and_a_note(project, params, tmp_path):
    dataset = {
        "name": "x",
        "digest": "1",
        "source_type": "local",
        "source": "{}",
        "profile": "{}",
        "context": "training",
    }
    (project / "reports/train").mkdir(parents=True)
    (project / "reports/train/metrics.json").write_text('{"best_val_loss": 4.5}')
    for _ in range(2):  # a second session repeats what the first one logged
        with tracking.start_run(params, "train", IDS, STOP) as run:
            run.inputs([dataset])
            run.table("samples.json", [{"prompt": "A", "sample": " <b>"}, {"prompt": "B", "sample": " c"}])
    sync.sync()  # what a busy machine has not delivered yet
    found = client(project).get_run(run.ids().mlflow_run_id)
    (given,) = found.inputs.dataset_inputs
    assert (given.dataset.name, given.tags[0].value) == ("x", "training")
    note = found.data.tags["mlflow.note.content"]
    assert "| validation loss | 4.5000 nats per token |" in note
    assert f"run_uuid={found.info.run_id})" in note
    assert json.loads(found.data.tags["mlflow.loggedArtifacts"]) == [{"path": "tables/samples.json", "type": "table"}]
    table = json.loads(Path(client(project).download_artifacts(found.info.run_id, "tables/samples.json")).read_text())
    prompt, sample = map(table["columns"].index, ("prompt", "sample"))
    assert [[row[prompt], row[sample]] for row in table["data"]] == [["A", " <b>"], ["B", " c"]]


def test_a_damaged_report_costs_the_note_and_nothing_else(project, params, capsys):
    (project / "reports/train").mkdir(parents=True)
    (project / "reports/train/metrics.json").write_text('{"best_val_loss": "4.5"}')
    with tracking.start_run(params, "train", IDS, STOP) as run:
        run.metrics(1, {"train/loss": 1.0})
    sync.sync()
    found = client(project).get_run(run.ids().mlflow_run_id)
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"train/loss": 1.0})
    assert capsys.readouterr().err.startswith("WARNING: MLflow gets no description of this run")


def test_a_run_of_a_sweep_is_a_child_also_after_an_outage(project, params, monkeypatch):
    parent = "b" * 32
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("GPT2_PARENT_RUN_ID", parent)
    leave_with(ValueError("x"), params, IDS)
    monkeypatch.delenv("GPT2_PARENT_RUN_ID")  # resumed by hand
    leave_with(ValueError("x"), params, IDS)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert sync.sync() == 0
    (found,) = client(project).search_runs([client(project).get_experiment_by_name("gpt2").experiment_id])
    assert found.data.tags[protocol.PARENT_TAG] == parent

    monkeypatch.setenv("GPT2_PARENT_RUN_ID", "c" * 32)  # another sweep takes the run from its checkpoint
    with tracking.start_run(params, "train", IDS, STOP) as run:
        pass
    with tracking.start_run(with_seed(params, 99), "evaluate", run.ids(), STOP) as evaluation:
        pass
    with tracking.start_run(with_seed(params, 99), "export-to-space", run.ids(), STOP):
        pass
    sync.sync()
    tags = [client(project).get_run(each.ids().mlflow_run_id).data.tags for each in (run, evaluation)]
    assert [each[protocol.PARENT_TAG] for each in tags] == ["c" * 32, found.info.run_id]
