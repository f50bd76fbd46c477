"""The real thing: `dvc repro` and experiments with tiny params in a repository of their own."""

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from ruamel.yaml import YAML

from gpt2.files import file_lock, sha256_of
from stages.cores import cores_lock
from tests.project import Project


def ran(output):
    return re.findall(r"Running stage '([a-z-]+)'", output)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("project"))
    project.is_warm = False  # once, with processes as everybody has them
    project.output = project.run("dvc", "repro")
    project.is_warm = True
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "run")
    return project


def test_repro_writes_all_outputs(project):
    assert ran(project.output) == ["fetch", "tokenize", "train", "evaluate", "export-to-space"]
    folder = project.folder
    train, evaluate = project.read("reports/train/metrics.json"), project.read("reports/evaluate/metrics.json")
    assert train["steps"] == 12
    assert train["stopped_early"] is False
    assert train["generalization_gap"] == train["last_val_loss"] - train["train_sample_loss"]
    assert train["epochs"] == pytest.approx(
        train["tokens"] / project.read("data/tokens/index.json")["splits"]["train"]["tokens"], abs=1e-3
    )
    assert evaluate["loss"] == pytest.approx(train["best_val_loss"], rel=2e-3)  # perhaps bf16 against fp32
    assert evaluate["loss"] < 10.8  # it learned something
    prompts = [sample["prompt"] for sample in project.read("reports/evaluate/samples.json")]
    assert (folder / "reports/evaluate/samples.md").read_text().count("## **") == len(prompts) > 0
    assert all(prompt in (folder / "mine.txt").read_text() for prompt in prompts)
    for picture in ("train/loss.png", "train/schedule.png", "evaluate/breakdown.png", "evaluate/passage.png"):
        assert (folder / "reports" / picture).stat().st_size > 5000
    names = {path.relative_to(folder / "dist/space").as_posix() for path in (folder / "dist/space").rglob("*.*")}
    assert names >= {
        "loss.png",
        "space/server.py",
        "gpt2/inference/engine.py",
        "app.py",
        "requirements.txt",
        "README.md",
        "gpt_model.pt",
        "gpt_config.pt",
        "manifest.json",
    }
    assert not [name for name in names if "__pycache__" in name]
    card = (folder / "dist/space/README.md").read_text()
    assert "{{" not in card
    assert YAML(typ="safe").load(card.split("---")[1])["sdk"] == "gradio"
    facts = project.read("dist/space/manifest.json")["model"]
    assert facts["mlflow_run_id"] == project.read("models/run.json")["mlflow_run_id"]
    assert str(folder) not in json.dumps(facts)  # no local paths


def test_the_environment_of_the_training_is_in_the_reports(project):
    (session,) = project.read("reports/train/environment.json")
    assert session["commit"] == project.run("git", "rev-parse", "HEAD~1").strip()  # a file cannot name its own commit
    assert session["dirty"] is False
    assert session["mlflow_run_id"] == project.read("models/run.json")["mlflow_run_id"]
    assert session["threads"] == session["processes"] == 1
    assert session["versions"]["torch"] in str(torch.__version__)
    models = project.folder / "models"
    sums = {"model": models / "model.safetensors", "last_model": models / "last.safetensors"}
    assert {name: session["sha256"][name] for name in sums} == {name: sha256_of(path) for name, path in sums.items()}
    assert session["sha256"]["corpus"] == project.read("data/corpus.json")["sha256"]
    text = json.dumps(session)
    assert not [name for name in (str(project.folder), getpass.getuser(), socket.gethostname()) if f'"{name}' in text]


def test_the_run_cache_has_the_training(project):
    """DVC keeps none for a stage with plain outputs that git has."""
    runs = [path.read_text() for path in (project.folder / ".dvc/cache/runs").rglob("*") if path.is_file()]
    assert any("python -m stages.train\n" in run and "environment.json" in run for run in runs)


def test_checkpoints_have_the_format_of_the_original_project(project):
    from gpt2.model.transformer import GPT

    paths = sorted(project.folder.glob("checkpoints/*/step-*/gpt_model_checkpoint.pt"))
    assert paths[-1].parent.name == "step-000012"
    checkpoint = torch.load(paths[-1], weights_only=True)
    GPT(checkpoint["config"]).load_state_dict(checkpoint["model_state_dict"])
    assert "optimizer_state_dict" in checkpoint


def test_the_repository_is_clean_after_a_run(project):
    assert project.run("git", "status", "--porcelain") == ""


def test_mlflow_has_one_run_for_the_whole_pipeline(project):
    (run,) = project.runs()
    assert run.info.status == "FINISHED"
    names = {"train/loss", "val/loss", "train/lr", "train/grad_norm", "train/tokens_per_s"}
    assert names | {"evaluate/loss", "evaluate/perplexity", "evaluate/bits_per_byte"} <= run.data.metrics.keys()
    assert run.data.params["train.max_steps"] == "12"
    assert {"git.commit", "git.dirty", "corpus.sha256", "tokens.sha256", "model.sha256"} <= run.data.tags.keys()
    assert run.data.tags["git.dirty"] == "false"
    artifacts = project.folder / "mlartifacts" / run.info.run_id / "artifacts"
    for name in ("reports/train/loss.png", "reports/evaluate/samples.md", "space/gpt_config.pt", "hf/config.json"):
        assert (artifacts / name).is_file()


def test_mlflow_has_the_data_the_samples_and_the_exported_model(project):
    (run,) = project.runs()
    contexts = [given.tags[0].value for given in run.inputs.dataset_inputs]
    assert contexts == ["corpus", "training", "validation"]
    artifacts = project.folder / "mlartifacts" / run.info.run_id / "artifacts"
    table = json.loads((artifacts / "tables/samples.json").read_text())
    samples = project.read("reports/evaluate/samples.json")
    assert table["data"] == [[sample["prompt"], sample["sample"]] for sample in samples]
    assert "| perplexity |" in run.data.tags["mlflow.note.content"]
    deadline_s = time.monotonic() + 180  # a process delivers the model after the stage
    while list((project.folder / "mlflow-outbox").glob("*.model")):
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    (version,) = project.model_versions()
    assert version.run_id == run.info.run_id
    model = project.folder / "mlartifacts/models" / version.source.rpartition("/")[2] / "artifacts"
    weights = (model / "artifacts/model/gpt_model.pt").read_bytes()
    assert weights == (project.folder / "dist/space/gpt_model.pt").read_bytes()


def test_a_second_repro_does_nothing(project):
    output = project.run("dvc", "repro")
    assert ran(output) == []
    assert "Data and pipelines are up to date." in output
    assert "up to date" in project.run("dvc", "status")


def test_a_complete_run_is_taken_from_its_checkpoint(project):
    before = (project.folder / "models/model.safetensors").read_bytes()
    environment = project.read("reports/train/environment.json")
    output = project.run("dvc", "repro", "--force", "--single-item", "train")
    assert project.read("reports/train/environment.json") == environment  # where it was trained, not where it is now
    assert "this run is complete in" in output
    assert (project.folder / "models/model.safetensors").read_bytes() == before
    assert len(project.runs()) == 1
    assert "up to date" in project.run("dvc", "status")


def test_the_exported_space_serves_itself_alone(project, tmp_path):
    copy = shutil.copytree(project.folder / "dist/space", tmp_path / "elsewhere")
    program = (
        "import app, sys, threading; from space import server, service; built, engine = server.build()\n"
        "threading.Thread(target=engine.serve, daemon=True).start()\n"
        "settings = {**service.DEFAULTS, 'prompt': 'A', 'max_new_tokens': 9, 'seed': 3}\n"
        "requests = service.requests_for(service.validate_settings(settings))\n"
        "print([step.status_line() for step in service.RequestRegistry(engine).generate(requests)][-1])\n"
        "print(sorted(name for name in sys.modules if name in ('stages', 'mlflow', 'dvc', 'safetensors.torch')))"
    )
    environment = {**os.environ, "PYTHONPATH": "", "GRADIO_ANALYTICS_ENABLED": "False"}
    result = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True, env=environment)
    assert re.match(r"Done: 9 tokens, \d+ tokens/s\n\[\]\n", result.stdout), result.stderr


def test_a_changed_evaluate_param_reruns_nothing_before_evaluate(project):
    project.change(evaluate={"seed": 5})
    output = project.run("dvc", "repro")
    assert ran(output)[0] == "evaluate"
    assert "train" not in ran(output)
    parents = [run.data.tags.get("mlflow.parentRunId") for run in project.runs()]
    assert project.read("models/run.json")["mlflow_run_id"] in parents  # the trained run keeps its own params
    project.run("git", "checkout", "-q", "params.yaml", "dvc.lock", "reports")
    project.run("dvc", "checkout", "-q", "--force")


def test_an_edit_of_the_users_text_is_detected(project):
    text = (project.folder / "mine.txt").read_text()
    (project.folder / "mine.txt").write_text(text + "One more line.\n")
    assert "fetch" in project.run("dvc", "status")
    (project.folder / "mine.txt").write_text(text)
    assert "up to date" in project.run("dvc", "status")


def test_an_experiment_in_a_temporary_copy_reports_to_the_one_database(project):
    before = {run.info.run_id for run in project.runs()}
    project.run("dvc", "exp", "run", "--temp", "--name", "longer", "-S", "train.max_steps=16")
    (new,) = [run for run in project.runs() if run.info.run_id not in before]
    assert new.data.params["train.max_steps"] == "16"
    assert new.data.tags["dvc.experiment"] == new.info.run_name == "longer"
    assert (project.folder / "mlartifacts" / new.info.run_id / "artifacts/reports/train/loss.png").is_file()
    runs = [path for path in (project.folder / "checkpoints").iterdir() if path.is_dir()]
    assert len(runs) == 2  # they outlive the copy
    table = project.run("dvc", "exp", "show", "--csv")
    assert "longer" in table
    assert "best_val_loss" in table


@pytest.mark.slow
def test_queued_experiments_report_to_the_one_database(project):
    before = {run.info.run_id for run in project.runs()}
    project.run("dvc", "exp", "run", "train", "--queue", "-S", "train.seed=3,4")
    project.run("dvc", "exp", "run", "--run-all")
    new = [run for run in project.runs() if run.info.run_id not in before]
    assert sorted(run.data.params["train.seed"] for run in new) == ["3", "4"]
    assert {run.info.status for run in new} == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "evaluate", "export_to_space"])
def test_a_stage_that_takes_all_cores_waits_for_the_other_one(project, stage, monkeypatch):
    project.change(runtime={"threads": None})
    monkeypatch.setenv("DVC_ROOT", str(project.folder))
    with file_lock(cores_lock()):
        command = [sys.executable, "-m", f"stages.{stage}"]
        waiting = subprocess.Popen(
            command, cwd=project.folder, env=project.environment, stderr=subprocess.PIPE, text=True
        )
        assert waiting.stderr.readline().startswith(f"waiting for the cores, in use by process {os.getpid()} on ")
    assert "Traceback" not in waiting.stderr.read()
    assert waiting.wait(timeout=60) == 0
    project.run("git", "checkout", "-q", "params.yaml", "reports")
    project.run("dvc", "checkout", "-q", "--force")


EXPERIMENTS = {
    "in the workspace": [["dvc", "exp", "run", "train", "-S", "train.seed=31"]],
    "in a copy": [["dvc", "exp", "run", "train", "--temp", "-S", "train.seed=32"]],
    "queued": [["dvc", "exp", "run", "train", "--queue", "-S", "train.seed=33"], ["dvc", "exp", "run", "--run-all"]],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", EXPERIMENTS)
def test_a_killed_experiment_resumes_wherever_it_ran(tmp_path, way):
    project = Project(tmp_path)
    project.change(train={"max_steps": 900, "eval_interval": 900}, runtime={"log_interval": 1})
    project.run("git", "commit", "-qam", "longer")
    *before, command = EXPERIMENTS[way]
    for each in before:
        project.run(*each)
    experiment = subprocess.Popen(
        command,
        cwd=project.folder,
        env=project.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while not (found := list((project.folder / "checkpoints").glob("*/step-0000[0-9]5"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in psutil.process_iter(["cmdline", "cwd"]):
        of_ours = str(process.info["cwd"]).startswith(str(project.folder))
        if of_ours and "stages.train" in " ".join(process.info["cmdline"] or ()):
            process.kill()
    experiment.wait(timeout=60)
    run = found[0].parent
    assert 0 < len((run / "history.jsonl").read_text().splitlines()) < 900

    for each in EXPERIMENTS[way]:
        output = project.run(*each)
    if way != "queued":  # the output of queued ones is in their logs
        assert re.search(r"resuming from step \d+ of 900", output)
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 901))
    assert sorted(path.name for path in run.glob("step-*")) == ["step-000900"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_an_interrupted_training_is_not_recorded_and_goes_on(project, number):
    project.change(train={"max_steps": 4000, "eval_interval": 1000, "warmup_steps": int(number)})
    command = [sys.executable, "-m", "stages.train"]
    before = len(project.runs())
    stage = subprocess.Popen(command, cwd=project.folder, env=project.environment, stderr=subprocess.PIPE, text=True)
    for line in stage.stderr:  # wait until the run is in MLflow, that is, the loop has started
        if "training" in line:
            break
    while len(project.runs()) == before:
        assert stage.poll() is None
        time.sleep(0.2)
    time.sleep(1)
    stage.send_signal(number)
    rest = stage.stderr.read()
    assert stage.wait(timeout=60) == 128 + number, rest
    assert "error: interrupted; the checkpoint of step" in rest
    assert "train" in project.run("dvc", "status")
    step = int(re.search(r"checkpoint of step (\d+)", rest).group(1))

    again = subprocess.Popen(command, cwd=project.folder, env=project.environment, stderr=subprocess.PIPE, text=True)
    assert f"resuming from step {step} of 4000" in again.stderr.readline()
    again.send_signal(number)
    again.stderr.read()
    assert again.wait(timeout=60) == 128 + number
    project.run("git", "checkout", "-q", "params.yaml", "reports")
    project.run("dvc", "checkout", "-q")


@pytest.mark.parametrize(
    ("changes", "code", "expected"),
    [
        ({"model": {"n_head": 3}}, 2, "model: n_embd 16 is not a multiple of n_head 3"),
        ({"train": {"sequence_length": 32}, "tokenize": {"validation_fraction": 0.999}}, 2, "use a longer text"),
        ({"runtime": {"device": "mps"}, "train": {"seed": 8}}, 2, "runtime.device is 'mps'"),
        ({"train": {"init_from": "./nowhere"}}, 2, "cannot load GPT-2 from './nowhere'"),
        ({"train": {"learning_rate": 1.0e20, "warmup_steps": 0}}, 3, "training diverged at step"),
    ],
)  # fmt: skip
@pytest.mark.skipif(torch.backends.mps.is_available(), reason="one of the cases needs a machine without MPS")
def test_errors_are_one_line_also_through_dvc(project, changes, code, expected):
    project.change(**changes)
    output = project.run("dvc", "repro", code=255)
    assert f"exited with {code}" in output
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert expected in line
    project.run("git", "checkout", "-q", "params.yaml", "dvc.lock", "reports")
    project.run("dvc", "checkout", "-q", "--force")
