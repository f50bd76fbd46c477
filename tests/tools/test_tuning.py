from pathlib import Path

from stages.params import load_params
from stages.tracking.description import flatten
from tests.conftest import ROOT
from tools import tuning


def test_the_table_shows_the_changes_of_each_experiment_best_first(monkeypatch):
    monkeypatch.chdir(ROOT)
    params = flatten(load_params(Path("presets/laptop.yaml")))
    rows = [
        {"name": "tune-a", "params": params, "loss": 4.9, "tokens_per_s": 4000, "seconds": 120},
        {"name": "tune-b", "params": {**params, "train.seed": "7"}, "loss": 4.8, "tokens_per_s": 4000, "seconds": 120},
    ]
    lines = tuning.table(rows).splitlines()
    assert lines[-2] == "| tune-b | seed 7 | 4.800 | 4,000 | 120 |"
    assert lines[-1] == "| tune-a | none | 4.900 | 4,000 | 120 |"
