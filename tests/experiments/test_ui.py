import json
import os
import subprocess
import sys

from experiments import ui
from experiments.registry import new_client
from stages.tracking.uploader import EXPERIMENT
from tests.conftest import ROOT


def test_the_view_has_a_column_for_each_param_that_differs():
    runs = [{"train.seed": "1", "train.learning_rate": "0.1", "corpus.source": "a", "model.n_layer": "4"}]
    runs.append({**runs[0], "train.seed": "2", "corpus.source": "b"})
    columns = ui.view(runs)["selectedColumns"]
    assert [name for name in columns if name.startswith("params")] == ["params.`train.seed`", "params.`corpus.source`"]
    assert columns[0] == "metrics.`evaluate/loss`"


def test_the_link_names_a_view_that_mlflow_keeps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ui.main() == 2
    assert capsys.readouterr().err.count("\n") == 1  # there are no runs yet
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    client.search_experiments()  # makes the database
    assert ui.link(new_client(tmp_path)) == ""
    experiment = client.create_experiment(EXPERIMENT)
    assert ui.link(new_client(tmp_path)).startswith(f"#/experiments/{experiment}/runs?viewStateShareKey={ui.VIEW}")
    tags = client.get_experiment(experiment).tags
    assert json.loads(tags[ui.VIEW_TAG])["orderByKey"] == "metrics.`evaluate/loss`"
    assert tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_server_that_does_not_answer_is_one_line(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "http://me:s3cret@127.0.0.1:9"}
    command = [sys.executable, "-m", "experiments.ui"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: MLflow does not answer (")
    assert "s3cret" not in done.stderr
