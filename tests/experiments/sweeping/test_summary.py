"""What a sweep leaves behind: its table, its plots, the best trial."""

import csv
import io
import re
from dataclasses import replace

import pytest
from optuna.trial import TrialState

from experiments.sweeping import summary
from experiments.sweeping.config import load_sweep
from experiments.sweeping.study import SweepStudy
from tests.conftest import ROOT


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Six trials: complete, one pruned, one equal to an earlier one, one failed."""
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    config, base = load_sweep(ROOT / "sweep.yaml", ROOT / "params.yaml")
    study = SweepStudy(tmp_path, replace(config, trials=6, name="hostile-script"), base)
    study.find()
    study.create({})
    distributions = {name: param.distribution() for name, param in config.space.items()}
    for value in (3.0, 2.0, 2.5, None, 2.0):
        trial = study.optuna.ask(distributions)
        for step in (50, 100):
            trial.report(9.0 - step / 100, step)
        trial.set_user_attr("ended", "pruned at step 100" if value is None else "complete")
        study.optuna.tell(trial, value, TrialState.PRUNED if value is None else TrialState.COMPLETE)
    study.optuna.tell(study.optuna.ask(), state=TrialState.FAIL)
    monkeypatch.chdir(tmp_path)
    return study


def test_the_best_trial_and_how_to_adopt_it_are_told(study, capsys, tmp_path):
    summary.write(study, {"mlflow_run_id": None})
    told = capsys.readouterr().err
    assert "the best of 5 trials: train.best_val_loss 2, trial 1" in told
    assert "dvc exp apply hostile-script-001" in told
    folder = tmp_path / "reports/sweep/hostile-script"
    table = list(csv.DictReader(io.StringIO((folder / "trials.csv").read_text())))
    assert [row["state"] for row in table] == ["COMPLETE"] * 3 + ["PRUNED", "COMPLETE"]
    text = (folder / "summary.md").read_text()
    assert text.index("hostile-script-001") < text.index("hostile-script-000") < text.index("hostile-script-003")
    assert "pruned at step 100" in text
    assert "| train.learning_rate |" in text


def test_the_plots_need_no_network(study):
    page = summary.to_html(study)
    for title in ("Parallel Coordinate Plot", "Slice Plot", "Hyperparameter Importances", "Optimization History"):
        assert title in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)


def test_a_sweep_without_trials_leaves_nothing(study, tmp_path):
    empty = SweepStudy(tmp_path, replace(study.config, name="empty"), study.base)
    empty.create({})
    summary.write(empty, {})
    assert not (tmp_path / "reports").exists()


def test_mlflow_that_does_not_answer_is_a_warning(study, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert summary.start_parent(study.config, "0" * 40) is None
    summary.end_parent("0" * 32, study.config, [], tmp_path, is_done=True)
    assert capsys.readouterr().err.count("WARNING: MLflow does not answer") == 2
