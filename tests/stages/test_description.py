import json
import shutil
import subprocess
from dataclasses import replace

import pytest
from ruamel.yaml import YAML

from gpt2.files import write_json
from stages import paths
from stages.params import load_params
from stages.tracking import description
from tests.conftest import ROOT


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository with params.yaml and presets, which DVC runs no experiment in."""
    monkeypatch.chdir(tmp_path)
    for variable in ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", description.PARENT_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    shutil.copytree(ROOT / "presets", "presets")
    shutil.copyfile(ROOT / "params.yaml", "params.yaml")
    commit("start")
    return tmp_path


def commit(message):
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", message]):
        subprocess.run([*git, *command], check=True)


def changed(section, **values):
    """The committed params with changes, also in params.yaml."""
    yaml = YAML()
    content = yaml.load(paths.PARAMS)
    content[section].update(values)
    yaml.dump(content, paths.PARAMS)
    return load_params(paths.PARAMS)


def test_a_run_is_named_by_what_differs_from_the_committed_params(project, monkeypatch):
    assert description.run_name(load_params(paths.PARAMS)) == "laptop"
    params = changed("train", learning_rate=0.003, optimizer="adamw")
    assert description.run_name(params) == "adamw, lr 3e-3"
    monkeypatch.setenv("DVC_EXP_NAME", "warty-wage")  # DVC's own choice says less
    assert description.run_name(params) == "adamw, lr 3e-3"
    monkeypatch.setenv("DVC_EXP_NAME", "tune-wide")
    assert description.run_name(params) == "tune-wide"
    monkeypatch.delenv("DVC_EXP_NAME")
    commit("adopted")
    assert description.run_name(params) == "adamw, lr 3e-3"  # now from the default preset
    assert description.run_name(changed("train", seed=3)) == "seed 3"
    shutil.copyfile("presets/seed.yaml", "params.yaml")
    assert description.run_name(load_params(paths.PARAMS)) == "seed"


def test_a_name_is_short_and_without_secrets(project):
    changed("corpus", source="https://me:s3cret@example.org/novels/emma.txt?key=s3cret", limit="1000 documents")
    changed("train", max_steps=800, batch_size=4, beta2=0.9)
    params = changed("evaluate", seed=5)
    assert description.run_name(params) == "batch 4, steps 800, beta2 0.9, emma.txt, 2 more"


def test_the_name_that_dvc_chose_is_the_last_resort(project, monkeypatch):
    params = load_params(paths.PARAMS)
    shutil.rmtree("presets")
    assert description.run_name(params) is None
    monkeypatch.setenv("DVC_EXP_NAME", "warty-wage")
    assert description.run_name(params) == "warty-wage"
    paths.PARAMS.write_text("train: [broken")
    commit("broken params are no reason to fail")
    assert description.run_name(replace(params, train=replace(params.train, seed=3))) == "warty-wage"


def test_numbers_look_as_people_write_them():
    numbers = {0.02: "0.02", 0.003: "3e-3", 6e-4: "6e-4", 1.5e-5: "1.5e-5", 0.0: "0", 1.5: "1.5"}
    assert {number: description._short_number(number) for number in numbers} == numbers


def test_a_run_belongs_to_the_sweep_that_started_it(project, monkeypatch):
    assert description.parent_tag() == {}
    monkeypatch.setenv(description.PARENT_VARIABLE, "b" * 32)
    assert description.parent_tag() == {"mlflow.parentRunId": "b" * 32}


def test_corpus_and_tokens_are_datasets(project):
    shards = [{"file": "x", "tokens": 5, "sha256": "c" * 64}]
    index = {"splits": {"train": {"tokens": 9, "documents": 2, "shards": shards}, "val": {"tokens": 1, "shards": []}}}
    write_json(
        paths.CORPUS_FACTS,
        {"name": "emma.txt", "source": "https://me:s3cret@example.org/emma.txt?key=s3cret", "sha256": "d" * 64},
    )
    corpus, train, val = description.datasets(index)
    assert (corpus["name"], corpus["digest"], corpus["source_type"]) == ("emma.txt", "d" * 36, "http")
    assert json.loads(corpus["source"]) == {"url": "https://***@example.org/emma.txt?***"}
    assert [each["context"] for each in (corpus, train, val)] == ["corpus", "training", "validation"]
    assert json.loads(train["profile"])["num_elements"] == 9
    assert train["digest"] != val["digest"]


def test_the_note_says_the_numbers_and_shows_the_pictures_of_its_stage(project):
    write_json(paths.TRAIN_REPORT / "metrics.json", {"best_val_loss": 4.68, "tokens": 512000, "tokens_per_s": 9000})
    write_json(
        paths.EVALUATE_REPORT / "metrics.json",
        {"loss": 4.5, "perplexity": 90.0, "bits_per_byte": 2.1, "bits_per_byte_low": 2.0, "bits_per_byte_high": 2.2},
    )
    write_json(
        paths.EVALUATE_REPORT / "samples.json", [{"prompt": "ROMEO:", "sample": "``` <script>alert(1)</script>"}]
    )
    trained = description.note("train")
    assert "| validation loss | 4.6800 nats per token |" in trained  # not that of an earlier evaluation
    assert "| training tokens | 512,000 |" in trained
    assert "![loss](get-artifact?path=reports%2Ftrain%2Floss.png&run_uuid=TRAINING_RUN)" in trained
    assert "ROMEO" not in trained
    evaluated = description.note("evaluate")
    assert "| bits per byte | 2.100 (2.000 to 2.200) |" in evaluated
    assert "![passage](get-artifact?path=reports%2Fevaluate%2Fpassage.png&run_uuid=MLFLOW_RUN)" in evaluated
    assert evaluated.endswith("```text\nROMEO:''' <script>alert(1)</script>\n```")
    (paths.EVALUATE_REPORT / "metrics.json").write_text("{")
    assert "| validation loss | 4.6800" in description.note("evaluate")


def test_the_note_tells_of_early_stopping_and_overfitting(project):
    losses = {"best_val_loss": 4.6, "last_val_loss": 5.0, "train_sample_loss": 2.0, "generalization_gap": 3.0}
    metrics = {**losses, "best_step": 300, "steps": 500, "stopped_early": True, "overfits": True}
    write_json(paths.TRAIN_REPORT / "metrics.json", metrics)
    note = description.note("train")
    assert "| stopped early | after step 500 |" in note
    assert "| generalization gap | 3.000 nats per token |" in note
    assert "**Warning:** the model overfits: after step 500 its loss is 5.00 on the validation text" in note
    write_json(paths.TRAIN_REPORT / "metrics.json", {**metrics, "stopped_early": False, "overfits": False})
    assert "stopped early" not in description.note("train")
    assert "Warning" not in description.note("train")
