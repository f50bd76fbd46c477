from types import SimpleNamespace

import pytest

from experiments import registry
from experiments.files import MlflowFiles, WorkspaceFiles
from experiments.runs import Run
from experiments.settings import Setting
from gpt2.__main__ import main
from gpt2.errors import UserError
from stages.tracking.models import NAME
from stages.tracking.uploader import EXPERIMENT
from tests.experiments.repository import Repository

NOBODY = "0" * 32


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """A folder, its MLflow, and two runs in it. The first has two versions of a registered model."""
    import mlflow

    root = tmp_path_factory.mktemp("root")
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.create_experiment(EXPERIMENT, artifact_location=(root / "mlartifacts").as_uri())
    runs = [client.create_run(experiment, tags={"dvc.experiment": name}).info.run_id for name in ("B", "A")]
    client.create_registered_model(NAME)
    for number in range(2):
        client.create_model_version(NAME, f"{root.as_uri()}/{number}", runs[0])
    return SimpleNamespace(root=root, client=client, runs=runs)


@pytest.fixture
def empty(tmp_path):
    return tmp_path


def test_the_champion_is_the_newest_version_of_a_run(mirror):
    assert registry.set_champion(mirror.runs[0], mirror.root) == "2"
    assert mirror.client.get_model_version_by_alias(NAME, "champion").run_id == mirror.runs[0]
    with pytest.raises(UserError, match="has no registered model; export it with `dvc repro`"):
        registry.set_champion(mirror.runs[1], mirror.root)
    assert mirror.client.get_model_version_by_alias(NAME, "champion").version == 2  # still


def test_a_run_is_found_in_mlflow_by_its_id_its_environment_or_its_experiment(mirror, empty):
    uri = f"sqlite:///{mirror.root / 'mlflow.db'}"
    assert registry.mlflow_run_id(Run("x", None, MlflowFiles(NOBODY, uri)), mirror.root) == NOBODY
    assert registry.mlflow_run_id(Run("B", "c" * 40, WorkspaceFiles(empty)), mirror.root) == mirror.runs[0]
    with pytest.raises(UserError, match='MLflow has no run of "o\'clock"'):
        registry.mlflow_run_id(Run("o'clock", "c" * 40, WorkspaceFiles(empty)), mirror.root)
    (empty / "reports/train").mkdir(parents=True)
    (empty / "reports/train/environment.json").write_text(f'[{{"mlflow_run_id": "{NOBODY}"}}]')
    assert registry.mlflow_run_id(Run("B", "c" * 40, WorkspaceFiles(empty)), mirror.root) == NOBODY


def test_the_better_model_becomes_the_champion_if_that_is_more_than_luck(mirror, empty):
    def setting(*names, loss):
        runs = tuple(Run(name, "c" * 40, WorkspaceFiles(empty)) for name in names)
        for run in runs:
            vars(run)["evaluate_metrics"] = {"loss": loss}
        return Setting(runs)

    a, b = setting("A", loss=4.6), setting("B", loss=4.5)
    assert "unchanged" in registry.crown([a, b], (-0.2, 0.1), mirror.root)
    assert "unchanged" in registry.crown([a, b], None, mirror.root)
    for order, interval in (([a, b], (-0.2, -0.1)), ([b, a], (0.1, 0.2))):
        line = registry.crown(order, interval, mirror.root)
        assert line == "champion: B, version 2 of models:/gpt2"
    with pytest.raises(UserError, match="no registered model"):
        registry.crown([a, b], (0.1, 0.2), mirror.root)
    with pytest.raises(UserError, match="chooses between two settings, not 3"):
        registry.crown([a, b, b], (0.1, 0.2), mirror.root)


def test_compare_sets_the_champion(mirror, tmp_path, monkeypatch, capsys):
    repository = Repository(tmp_path / "repository")
    repository.experiment("A", [4.6 + number % 7 / 100 for number in range(64)])
    repository.experiment("B", [4.4 + number % 7 / 100 for number in range(64)], train__learning_rate=0.005)
    monkeypatch.chdir(repository.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mirror.root / 'mlflow.db'}")
    assert main(["compare", "A", "B", "--set-champion"]) == 0
    assert capsys.readouterr().err == "champion: B, version 2 of models:/gpt2\n"
    assert main(["compare", "B", "B", "--set-champion"]) == 2


def test_without_mlflow_there_is_one_line(empty, monkeypatch):
    with pytest.raises(UserError, match=r"mlflow\.db does not exist; `dvc repro` makes it"):
        registry.set_champion(NOBODY, empty)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="MLflow does not answer"):
        registry.set_champion(NOBODY, empty)
