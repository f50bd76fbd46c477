"""The benchmark of sweeps: its search uses the sweep's own study code, and its table says what was measured."""

import math

from benchmarks import sweep
from tests.conftest import ROOT


def fake_training(trial):
    """A loss that falls with the steps; its level depends on the learning rate, as that of a training does."""
    level = abs(math.log(trial.params["train.learning_rate"] / 6e-3))
    for step in range(sweep.EVAL_INTERVAL, sweep.STEPS + 1, sweep.EVAL_INTERVAL):
        trial.report(level + 1 - step / sweep.STEPS, step)
        if trial.should_prune():
            return None
    return level


def test_a_pruned_search_takes_fewer_steps_than_random_search(monkeypatch):
    monkeypatch.chdir(ROOT)
    result = sweep.search(0, 20, fake_training)
    assert result["random"]["steps"] == 20 * sweep.STEPS
    assert result["random"]["pruned"] == 0
    assert result["sweep"]["pruned"] >= 10
    assert result["sweep"]["steps"] < 0.6 * result["random"]["steps"]
    assert len(result["sweep"]["bests"]) == 20


def test_the_table_says_when_the_sweep_was_as_good_as_random_search():
    search = {
        "seed": 1,
        "random": {"seconds": 100.0, "best": 2.3, "pruned": 0, "steps": 9},
        "sweep": {"seconds": 40.0, "best": 2.2, "pruned": 9, "steps": 3, "bests": [[10.0, None], [25.0, 2.25]]},
    }
    assert sweep.reached_at(search) == 25.0
    overhead = {"trial": [4.0, 5.0, 9.0], "trial, CPU": [3.0]}
    text = sweep.table({"machine": "a CPU", "search": [search], "overhead": overhead})
    assert "| 1 | 2.3000 | 100 | 2.2000 | 40 | 9 | 40% | 25% |" in text
    assert "| trial | 5.0 | 3.0 | 4.0 | 9.0 |" in text
