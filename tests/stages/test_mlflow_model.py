"""The exported model in MLflow: registered once, its weights not copied, the same text as `python -m gpt2`."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

from gpt2.__main__ import main
from gpt2.files import write_json
from gpt2.model.storage import save_weights
from gpt2.model.transformer import GPT
from stages import paths, sync, tracking
from stages.export_to_space import MODEL_FILES
from stages.params import load_params
from stages.tracking import RunIds, handover, models, protocol, uploader
from tests.conftest import ROOT, TINY, NeverStops
from tests.space.conftest import FACTS, write_space
from tools.screenshots import free_port

IDS = RunIds("a" * 32, None)
OPTIONS = {"max_new_tokens": 12, "seed": 3, "dtype": "fp32"}
PROGRAM = """
import json, sys
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/gpt2/latest")
prompts, params = json.loads(sys.argv[2]), json.loads(sys.argv[3])
try:
    print(json.dumps(model.predict(prompts, params=params)))
except mlflow.exceptions.MlflowException as error:
    print(error.message)
import gpt2
print(gpt2.__file__)
print([name for name in ("stages", "gradio", "safetensors") if name in sys.modules])
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a trained model and its Space, and an MLflow of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for variable in (*uploader.SHORT_TIMEOUTS, "DVC_EXP_NAME"):
        monkeypatch.delenv(variable, raising=False)
    paths.SPACE.mkdir(parents=True)
    write_space(paths.SPACE)
    for name in MODEL_FILES:
        (paths.SPACE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, paths.SPACE / name)
    shutil.copyfile(ROOT / "space/requirements.txt", paths.SPACE / "requirements.txt")
    torch.manual_seed(0)
    save_weights(GPT(TINY).state_dict(), paths.MODELS / "model.safetensors")
    write_json(paths.MODELS / "config.json", TINY.to_dict())
    write_json(paths.RUN, {"run_id": IDS.run_id, "mlflow_run_id": None, "sequence_length": FACTS["context"]})
    return tmp_path


@pytest.fixture
def params():
    return load_params(ROOT / "params.yaml")


def uri(project):
    return f"sqlite:///{project / 'mlflow.db'}"


def client(project):
    import mlflow

    return mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or uri(project))


def versions(project):
    return client(project).search_model_versions(f"name = '{models.NAME}'")


def predict(project, prompts, **params):
    """What a process of its own, outside of the repository, gets of the newest version."""
    command = [sys.executable, "-c", PROGRAM, uri(project), json.dumps(prompts), json.dumps(params)]
    environment = {**os.environ, "PYTHONPATH": "", "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-3:]


def hand_over(params, ids=IDS):
    tracking.hand_over_model(params, ids, paths.SPACE, MODEL_FILES, FACTS)


def wait_for_delivery(seconds=180):
    deadline_s = time.monotonic() + seconds
    while protocol.records():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_the_exported_model_is_registered_once_and_generates_what_the_command_line_does(project, params, capsys):
    with tracking.start_run(params, "export-to-space", IDS, NeverStops()) as run:
        pass
    ended = client(project).get_run(run.ids().mlflow_run_id).info
    started_s = time.monotonic()
    hand_over(params, run.ids())
    assert time.monotonic() - started_s < 3  # the stage does not wait
    wait_for_delivery()
    (version,) = versions(project)
    assert version.run_id == run.ids().mlflow_run_id
    assert "validation loss 5.5" in version.description
    after = client(project).get_run(version.run_id).info
    assert (after.status, after.end_time) == ("FINISHED", ended.end_time)  # that of the run, not of the model

    model = project / "mlartifacts/models" / version.source.rpartition("/")[2] / "artifacts"
    assert (model / "artifacts/model/gpt_model.pt").samefile(paths.SPACE / "gpt_model.pt")
    requirements = (model / "requirements.txt").read_text()
    assert "mlflow==" in requirements
    assert "torch" in requirements
    assert "gradio" not in requirements
    example = json.loads((model / "serving_input_example.json").read_text())
    assert example == {"inputs": ["The miller"], "params": models.EXAMPLE_PARAMS}

    hand_over(params, run.ids())  # the same model again
    wait_for_delivery()
    assert len(versions(project)) == 1

    shutil.rmtree(paths.SPACE)  # MLflow's is whole without it
    texts, code, imported = predict(project, ["ROMEO:", "The miller"], **OPTIONS)
    capsys.readouterr()
    for prompt, text in zip(["ROMEO:", "The miller"], json.loads(texts), strict=True):
        assert main(["generate", "--prompt", prompt, "--max-new-tokens", "12", "--seed", "3", "--dtype", "fp32"]) == 0
        assert capsys.readouterr().out == f"{text}\n"
    assert code.startswith(str(model))
    assert imported == "[]"
    message, _, _ = predict(project, ["ROMEO:"], max_new_tokens=0)
    assert message == "max_new_tokens is 0; expected at least 1"


def test_a_model_that_mlflow_does_not_take_is_delivered_later(project, params, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(handover, "start_uploader", lambda *_, **__: None)
    hand_over(params)
    assert sync.sync() == 1
    assert "1 records wait" in capsys.readouterr().err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (paths.SPACE / "gpt_model.pt").unlink()  # the record has the weights
    assert sync.sync() == 0
    (version,) = versions(project)
    assert client(project).get_run(version.run_id).info.status == "FINISHED"  # made for the model


def test_an_upload_that_fails_leaves_a_failed_model_and_is_repeated(project, params, monkeypatch):
    monkeypatch.setattr(handover, "start_uploader", lambda *_, **__: None)
    hand_over(params)
    with monkeypatch.context() as broken:
        broken.setattr(models, "save", lambda *_: exec("raise OSError('no space')"))
        assert sync.sync() == 1
    assert sync.sync() == 0
    experiment = client(project).get_experiment_by_name(uploader.EXPERIMENT).experiment_id
    found = client(project).search_logged_models([experiment])
    assert sorted(model.status.value for model in found) == ["FAILED", "READY"]
    assert len(versions(project)) == 1


def test_a_model_that_cannot_be_recorded_is_a_warning(project, params, capsys):
    (paths.SPACE / "gpt_config.pt").unlink()
    hand_over(params)
    error = capsys.readouterr().err
    assert error.startswith("WARNING: cannot write the model's record for MLflow")
    assert error.count("\n") == 1
    assert protocol.records() == []


def test_weights_are_copied_where_they_cannot_be_linked(project, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: exec("raise OSError('another file system')"))
    handover.link(paths.SPACE / "gpt_model.pt", tmp_path / "there/gpt_model.pt")
    assert (tmp_path / "there/gpt_model.pt").read_bytes() == (paths.SPACE / "gpt_model.pt").read_bytes()


@pytest.mark.slow
def test_a_served_model_answers(project, params, monkeypatch):
    monkeypatch.setattr(handover, "start_uploader", lambda *_, **__: None)
    hand_over(params)
    assert sync.sync() == 0
    (text,) = json.loads(predict(project, ["ROMEO:"], **OPTIONS)[0])
    port = free_port()
    command = ["mlflow", "models", "serve", "-m", "models:/gpt2/latest", "--env-manager", "local", "-p", str(port)]
    environment = {**os.environ, "PYTHONPATH": "", "MLFLOW_TRACKING_URI": uri(project)}
    server = subprocess.Popen([sys.executable, "-m", *command], cwd=project, env=environment, start_new_session=True)
    try:
        wait_until(f"http://127.0.0.1:{port}/ping")
        body = json.dumps({"inputs": ["ROMEO:"], "params": OPTIONS}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        assert json.load(urllib.request.urlopen(request)) == {"predictions": [text]}
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def wait_until(address, seconds=120, **headers):
    deadline_s = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=5).close()
        except urllib.error.HTTPError:
            return None
        except OSError:
            assert time.monotonic() < deadline_s
            time.sleep(0.3)


AUTHENTICATION = """
[mlflow]
default_permission = MANAGE
database_uri = sqlite:///{folder}/users.db
admin_username = admin
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@pytest.fixture
def server(project, monkeypatch):
    """`mlflow server --app-name basic-auth`, as MLFLOW_TRACKING_URI."""
    folder, port = project / "server", free_port()
    folder.mkdir()
    (folder / "users.ini").write_text(AUTHENTICATION.format(folder=folder, password="a-long-password"))
    command = [
        *("mlflow", "server", "--app-name", "basic-auth", "--workers", "1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{folder}/runs.db", "--artifacts-destination", str(folder / "artifacts")),
    ]
    environment = {
        **os.environ,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "users.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "for this test",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=folder, env=environment, start_new_session=True)
    try:
        wait_until(f"http://127.0.0.1:{port}/health")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait()


@pytest.mark.slow
def test_a_server_with_passwords_gets_everything_once_the_password_is_right(
    server, project, params, monkeypatch, capsys
):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-wrong-password")
    with tracking.start_run(params, "export-to-space", IDS, NeverStops()) as run:
        run.metrics(0, {"evaluate/loss": 2.5})
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "it refuses this user or password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in error
    assert "a-wrong-password" not in error
    monkeypatch.setattr(handover, "start_uploader", lambda *_, **__: None)
    hand_over(params)
    assert sync.sync() == 2
    assert len(protocol.records()) == 2  # nothing is lost
    assert "a-wrong-password" not in "".join(
        path.read_text() for path in paths.outbox().rglob("*.json*") if path.is_file()
    )

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password")
    assert sync.sync() == 0
    (version,) = versions(project)
    assert client(project).get_run(version.run_id).data.metrics == {"evaluate/loss": 2.5}
    basic = base64.b64encode(b"admin:a-long-password").decode()
    page = urllib.request.Request(
        f"{server}/get-artifact?path=x&run_uuid={version.run_id}", headers={"Authorization": f"Basic {basic}"}
    )
    with pytest.raises(urllib.error.HTTPError) as missing:  # the address that notes use for pictures
        urllib.request.urlopen(page)
    assert missing.value.code in (404, 500)
