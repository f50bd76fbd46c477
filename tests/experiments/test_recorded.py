import json
from types import SimpleNamespace

import pytest

from experiments.files import GitFiles, MlflowFiles
from experiments.recorded import _of_mlflow, find_recorded, params_of_mlflow
from experiments.reproduce import first_difference, write_params
from experiments.runs import Run
from gpt2.errors import UserError
from stages.params import load_params
from tests.experiments.repository import Repository

RUN_ID = "0123456789abcdef0123456789abcdef"
SESSION = {
    "device": "cpu",
    "threads": 999,
    "processes": 1,
    "strategy": None,
    "gradient_checkpointing": False,
    "precision": "bfloat16",
    "compiled": True,
    "run_id": "ours",
    "mlflow_run_id": RUN_ID,
    "sha256": {"corpus": "c0", "model": "m0", "last_model": None},
}


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path / "repository")


class Artifacts(MlflowFiles):
    """MLflow's run with these tags, params and artifacts, without MLflow."""

    def __init__(self, tags, params=None, artifacts=None):
        super().__init__(RUN_ID, "sqlite:///none.db")
        self.__dict__["run"] = SimpleNamespace(data=SimpleNamespace(tags=tags, params=params or {}))
        self.__dict__["artifacts"] = artifacts or {}

    def read(self, path):
        return self.__dict__["artifacts"].get(path)


def of_mlflow(repository, tags, **content):
    files = Artifacts({"model.sha256": "m0", "pipeline.run_id": "ours", **tags}, **content)
    return _of_mlflow(Run("lovely-owl", None, files), files, repository.folder)


def with_results(repository, session=SESSION):
    repository.write("reports/train/environment.json", [session])
    repository.write("reports/train/metrics.json", {"precision": "bfloat16", "compiled": True, "steps": 500})
    return repository.commit("results")


def test_a_commit_has_what_its_run_needs(repository):
    commit = with_results(repository)
    recorded = find_recorded("main", repository.folder)
    assert (recorded.commit, recorded.params, recorded.has_lock) == (commit, {}, True)
    assert recorded.sums == {"corpus": "c0", "model": "m0"}
    assert recorded.environment == SESSION


def test_a_commit_of_an_earlier_version_has_no_environment(repository):
    repository.write("reports/train/metrics.json", {"precision": "float32", "compiled": False})
    repository.commit("results")
    recorded = find_recorded("main", repository.folder)
    assert recorded.sums == {}
    assert recorded.environment["precision"] == "float32"


@pytest.mark.parametrize("name", ["main", "workspace"])
def test_without_results_in_a_commit_there_is_nothing_to_reproduce(repository, name):
    with pytest.raises(UserError, match=r"no results of a training|has no commit; `dvc exp save`"):
        find_recorded(name, repository.folder)


def test_an_mlflow_run_is_found_in_the_commit_that_holds_its_results(repository):
    commit = with_results(repository)
    with_results(repository, {**SESSION, "run_id": "other", "mlflow_run_id": "other"})
    dirty = {"git.commit": repository.head, "git.dirty": "true"}
    recorded = of_mlflow(repository, dirty)
    assert recorded.commit == commit
    assert recorded.has_lock
    assert f"MLflow's run {RUN_ID}" in recorded.origin


def test_an_mlflow_run_is_found_in_its_experiment(repository):
    repository.set_params(train__seed=5)
    repository.write("reports/train/environment.json", [SESSION])
    commit = repository.experiment("tidy-fox", train__seed=5)
    assert of_mlflow(repository, {"dvc.experiment": "tidy-fox"}).commit == commit


def test_an_mlflow_run_of_an_earlier_version_is_found_by_the_name_of_its_experiment(repository):
    commit = repository.experiment("tidy-fox", train__seed=5)
    tags = {"dvc.experiment": "tidy-fox", "git.commit": repository.head, "git.dirty": "true"}
    assert of_mlflow(repository, tags, params={"train.seed": "5"}).commit == commit
    with pytest.raises(UserError, match="its code is lost"):  # another run had this name
        of_mlflow(repository, tags, params={"train.seed": "6"})


def test_an_mlflow_run_whose_results_are_in_no_commit_gets_its_params_from_mlflow(repository):
    artifacts = {"reports/train/environment.json": json.dumps([{**SESSION, "sha256": {"model": "m1"}}]).encode()}
    tags = {"git.commit": repository.head, "git.dirty": "false", "corpus.sha256": "c0"}
    recorded = of_mlflow(repository, tags, params={"train.seed": "5", "model.n_layer": "4"}, artifacts=artifacts)
    assert (recorded.commit, recorded.has_lock) == (repository.head, False)
    assert recorded.params == {"train": {"seed": 5}}
    assert recorded.sums == {"model": "m1"}
    assert of_mlflow(repository, tags).sums == {"model": "m0", "corpus": "c0"}  # an earlier version


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"model.sha256": None}, "has no trained model"),
        ({}, "has no tag git.commit"),
        ({"git.commit": "f" * 40}, "is not in this repository; try `git fetch --all`"),
        ({"git.commit": "HEAD", "git.dirty": "true"}, "its code is lost; next time, use `dvc exp run`"),
    ],
)
def test_an_mlflow_run_that_cannot_be_trained_again(repository, tags, message):
    all_tags = {"model.sha256": "m0", **tags}
    files = Artifacts({key: value for key, value in all_tags.items() if value is not None})
    with pytest.raises(UserError, match=message):
        _of_mlflow(Run("lovely-owl", None, files), files, repository.folder)


def test_params_from_mlflow(repository):
    repository.set_params(corpus__source="https://me:secret@example.org/text.txt")
    commit = Run("", None, GitFiles(repository.folder, repository.commit("secret")))
    logged = {
        "corpus.source": "https://***@example.org/text.txt",  # the commit's own
        "corpus.limit": "None",
        "train.learning_rate": "0.0003",
        "train.optimizer": "adamw",
        "evaluate.prompts": "['One', 'two: three']",
        "tokenize.deduplicate": "True",
    }
    assert params_of_mlflow(logged, commit) == {
        "train": {"learning_rate": 0.0003, "optimizer": "adamw"},
        "evaluate": {"prompts": ["One", "two: three"]},
        "tokenize": {"deduplicate": True},
    }
    with pytest.raises(UserError, match=r"only a part of corpus\.source"):
        params_of_mlflow({"corpus.source": "https://***@example.org/other.txt"}, commit)
    with pytest.raises(UserError, match=r"only a part of evaluate\.prompts"):
        params_of_mlflow({"evaluate.prompts": "x" * 6000}, commit)


def test_the_run_trains_as_it_did_then_and_not_from_its_checkpoints(repository):
    with_results(repository)
    repository.set_params(runtime__checkpoint_folder="/mnt/big")
    path = repository.folder / "params.yaml"
    write_params(path, find_recorded("main", repository.folder))
    runtime = load_params(path).runtime
    assert (runtime.precision, runtime.compile, runtime.device, runtime.threads) == ("bf16", "always", "cpu", 999)
    assert runtime.checkpoint_folder == "checkpoints"
    path.write_text("runtime: {precision: auto}\ntrain: {seed: 1}\n")  # of an earlier version
    write_params(path, find_recorded("main", repository.folder))
    assert "checkpoint_folder" not in path.read_text()
    assert "precision: bf16" in path.read_text()


def history(*rows):
    return "\n".join(("step,train_loss,val_loss,learning_rate,grad_norm,tokens_per_s", *rows)).encode()


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (history("10,7.5,,0.1,2.0,150", "20,6.5,6.75,0.1,2.0,150"), "step 20, val_loss 6.75 instead of 6.7"),
        (history("10,7.25,,0.1,3.0,100"), "step 10, train_loss 7.25 instead of 7.5"),
        (history("10,7.5,,0.1,2.0,150", "15,1,,1,1,1", "20,6.5,6.7,0.1,2.0,9"), "equal at all 2 logged steps"),
    ],
)
def test_the_first_difference_of_two_histories(now, expected):
    then = history("10,7.5,,0.1,2.0,100", "20,6.5,6.7,0.1,2.0,100")
    assert expected in first_difference(then, now)
    assert "no history" in first_difference(None, now)
