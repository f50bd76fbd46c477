import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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


def test_a_port_in_use_is_one_line(tmp_path, monkeypatch, capsys):
    import mlflow

    monkeypatch.chdir(tmp_path)
    mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").create_experiment(EXPERIMENT)
    with socket.create_server((ui.HOST, 0)) as other:
        monkeypatch.setattr(ui, "PORT", other.getsockname()[1])
        assert ui.main() == 2
    assert "is in use; stop the program" in capsys.readouterr().err


def test_the_page_of_runs_is_told_once_it_is_served(tmp_path, monkeypatch, capsys):
    served = []

    class Health(BaseHTTPRequestHandler):
        def do_GET(self):
            served.append(self.path)
            self.send_response(200)
            self.end_headers()

    with ThreadingHTTPServer((ui.HOST, 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ui.announce(f"http://{ui.HOST}:{server.server_address[1]}", "http://page")
        server.shutdown()
    assert served == ["/health"]
    assert capsys.readouterr().out == "\nThe runs: http://page\n\n"


def test_a_server_that_does_not_answer_is_one_line(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "http://me:s3cret@127.0.0.1:9"}
    command = [sys.executable, "-m", "experiments.ui"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: MLflow does not answer (")
    assert "s3cret" not in done.stderr
