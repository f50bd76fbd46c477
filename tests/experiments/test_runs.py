import json
import subprocess
import sys

import numpy as np
import pytest

from experiments.runs import differing_params, experiments, find_run
from gpt2.errors import UserError
from stages.params import load_params
from tests.conftest import ROOT, NeverStops
from tests.experiments.repository import Repository


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path / "repository")


def test_an_experiment_is_read_from_git_alone(repository):
    commit = repository.experiment("brave-owl", [5.0, 4.0], train__seed=2, train__learning_rate=3.0e-4)
    (run,) = experiments(repository.folder)
    assert (run.name, run.commit) == ("brave-owl", commit)
    assert run.params["train"]["seed"] == 2
    assert run.params["train"]["learning_rate"] == 3.0e-4
    assert run.train_metrics == {"tokens_per_s": 4000, "peak_memory_bytes": 10**9}
    assert run.evaluate_metrics["loss"] == 4.5
    assert run.losses.losses.tolist() == [5.0, 4.0]
    assert run.losses.lengths.tolist() == [128, 128]
    assert not (repository.folder / "reports").exists()  # the workspace has no run


def test_what_is_not_there_is_empty(repository):
    run = find_run("workspace", repository.folder)
    assert run.commit is None
    assert run.params["model"]["n_layer"] == 4
    assert (run.train_metrics, run.evaluate_metrics, run.samples, run.environment) == ({}, {}, [], {})
    assert run.history is None
    assert run.losses is None


@pytest.mark.parametrize("content", ["", "[1, 2", "[1, 2]", '"text"', '{"losses": [1]}', "\x00\xff"])
def test_what_is_damaged_is_empty(repository, content):
    for path in (
        "params.yaml",
        "reports/train/metrics.json",
        "reports/train/environment.json",
        "reports/evaluate/samples.json",
        "reports/evaluate/segment_losses.json",
    ):
        repository.write(path, content)
    repository.write("reports/train/history.csv", "")
    run = find_run("workspace", repository.folder)
    assert (run.params, run.samples, run.losses, run.history) == ({}, [], None, None)
    assert run.train_metrics == {}
    assert run.environment in ({}, {"losses": [1]})


def test_history_and_samples(repository):
    repository.write("reports/train/history.csv", "step,train_loss,val_loss\n10,7.5,\n20,6.5,6.9\n")
    repository.write("reports/evaluate/samples.json", [{"prompt": "A", "sample": " b"}])
    run = find_run("workspace", repository.folder)
    assert run.history["train_loss"].tolist() == [7.5, 6.5]
    assert run.samples == [{"prompt": "A", "sample": " b"}]


def test_a_run_is_found_by_experiment_branch_tag_and_commit(repository):
    commit = repository.experiment("brave-owl", [5.0])
    repository.git("branch", "wide", commit)
    repository.git("tag", "v1", commit)
    for name, shown in {
        "brave-owl": "brave-owl",
        "wide": "wide",
        "v1": "v1",
        commit: commit[:7],
        commit[:9]: commit[:7],
        "main~0": "main~0",
    }.items():
        run = find_run(name, repository.folder)
        assert run.name == shown
        assert run.commit == (repository.head if name == "main~0" else commit)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("brave-owk", "did you mean 'brave-owl'?"),
        ("mian", "did you mean 'main'?"),
        ("nothing-like-it", "`dvc exp show` lists the experiments"),
        ("", "`dvc exp show` lists the experiments"),
        ("--output=x", "`dvc exp show` lists the experiments"),
        ("a\nb", "`dvc exp show` lists the experiments"),
        ("0" * 32, "mlflow.db does not exist"),
    ],
)
def test_an_unknown_name_says_what_could_be_meant(repository, name, hint):
    repository.experiment("brave-owl", [5.0])
    with pytest.raises(UserError) as caught:
        find_run(name, repository.folder)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_two_experiments_with_one_name_that_on_head_is_meant(repository):
    repository.experiment("again", [5.0])
    old_head, repository.head = repository.head, repository.commit("next")
    newer = repository.experiment("again", [4.0])
    assert find_run("again", repository.folder).commit == newer
    repository.git("commit", "-q", "--allow-empty", "-m", "third")
    with pytest.raises(UserError, match="2 experiments 'again'; name one by its commit: "):
        find_run("again", repository.folder)
    repository.git("reset", "-q", "--hard", old_head)
    assert find_run("again", repository.folder).losses.losses.tolist() == [5.0]


def test_refs_of_dvcs_own_are_no_experiments(repository):
    for ref in ("exec/EXEC_HEAD", "stash", "celery/stash", "apply/ORIG_HEAD", "temp/abc"):
        repository.git("update-ref", f"refs/exps/{ref}", repository.head)
    assert experiments(repository.folder) == []


def test_params_that_differ_are_named_without_the_runtime(repository):
    repository.experiment("a", train__seed=1, evaluate__prompts=["x"], runtime__threads=1)
    repository.experiment("b", train__seed=2, evaluate__prompts=["x", "y"], runtime__threads=2)
    repository.experiment("c", train__seed=2, evaluate__prompts=["x"], model__n_layer=2)
    runs = experiments(repository.folder)
    assert differing_params(runs) == ["model.n_layer", "train.seed", "evaluate.prompts"]
    assert differing_params(runs[:2]) == ["train.seed", "evaluate.prompts"]
    assert differing_params(runs[:1]) == differing_params([]) == []


def test_outside_of_a_repository_there_are_no_experiments(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert experiments(tmp_path) == []
    with pytest.raises(UserError, match="there is no experiment"):
        find_run("main", tmp_path)


def test_a_run_is_found_by_its_id_in_mlflow(repository, monkeypatch):
    from stages import tracking

    repository.write("reports/train/metrics.json", {"tokens_per_s": 4000})
    monkeypatch.chdir(repository.folder)
    monkeypatch.setenv("DVC_ROOT", str(repository.folder))
    monkeypatch.setenv("DVC_EXP_NAME", "brave-owl")
    params = load_params(ROOT / "params.yaml")
    with tracking.start_run(params, "train", tracking.RunIds("a" * 32, None), NeverStops()) as logged:
        logged.files([repository.folder / "reports/train/metrics.json"], "reports/train")
    run = find_run(logged.ids().mlflow_run_id, repository.folder)
    assert (run.name, run.commit) == ("brave-owl", repository.head)
    assert run.train_metrics == {"tokens_per_s": 4000}
    assert run.losses is None
    assert run.params["train"]["learning_rate"] == params.train.learning_rate
    assert run.params["corpus"] == {
        "source": "tinyshakespeare",
        "fallback": "python-docs",
        "text_column": "text",
        "limit": None,
    }
    workspace = find_run("workspace", repository.folder)
    assert differing_params([run, workspace]) == []
    with pytest.raises(UserError, match="MLflow has no run 0000"):
        find_run("0" * 32, repository.folder)


def test_many_experiments_are_read_quickly(repository):
    """Without DVC and torch, and with one process of git for all files."""
    for number in range(5):
        repository.experiment(f"run-{number}", np.full(300, 5.0), train__seed=number)
    program = (
        "import sys, json; from pathlib import Path; from experiments.runs import experiments\n"
        "runs = experiments(Path(sys.argv[1]))\n"
        "print(json.dumps([len(runs), [r.params['train']['seed'] for r in runs], len(runs[4].losses.losses),\n"
        "  sorted({'dvc', 'torch', 'mlflow', 'pandas'} & set(sys.modules))]))"
    )
    command = [sys.executable, "-c", program, str(repository.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [5, [0, 1, 2, 3, 4], 300, []]
