"""The study of a sweep: what its workers run, and that nothing is run twice or lost."""

import json
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace

import optuna
import pytest
from ruamel.yaml import YAML

from experiments.sweeping import study as module
from experiments.sweeping.config import PrunerConfig, load_sweep
from experiments.sweeping.space import Choices, Range
from experiments.sweeping.study import SweepStudy, best_of, make_pruner, make_sampler
from gpt2.errors import UserError
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def no_other_storage(monkeypatch):
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)


@pytest.fixture
def make(tmp_path):
    """A study in a folder of its own; another process of the same study with a second call."""
    config, base = load_sweep(ROOT / "sweep.yaml", ROOT / "params.yaml")

    def make_study(**changes):
        study = SweepStudy(tmp_path, replace(config, **changes), base)
        if study.find() is None:
            study.create({"base": "0" * 40})
        return study

    return make_study


def run_all(study):
    """The values of the trials that a worker gets until the budget is spent."""
    values = []
    while True:
        with ExitStack() as held:
            trial = study.next_trial(held)
            if trial is None:
                return values
            values.append(trial.params)
            study.optuna.tell(trial, float(len(values)))


def test_workers_share_the_budget(make):
    first, second = make(trials=3), make(trials=3)
    with ExitStack() as held:
        trial, other = first.next_trial(held), second.next_trial(held)
        assert (trial.number, other.number) == (0, 1)
        assert trial.params != other.params
        assert len(run_all(first)) == 1
        assert second.next_trial(held) is None


def test_a_trial_whose_worker_was_killed_is_taken_over_with_its_values(make, tmp_path):
    study = make(trials=4)
    with ExitStack() as held:
        values = study.next_trial(held).params
    # its lock is free, as after a SIGKILL
    with ExitStack() as held:
        again = make(trials=4).next_trial(held)
        assert (again.number, again.params) == (0, values)
        with ExitStack() as others:
            assert make(trials=4).next_trial(others).number == 1  # the first one has a worker


def test_a_trial_of_another_machine_is_taken_over_when_it_is_silent(make):
    study = make(trials=4)
    with ExitStack() as held:
        trial = study.next_trial(held)
        trial.set_user_attr(module.WORKER, {"host": "elsewhere", "pid": 1, "seen": time.time()})
    with ExitStack() as held:
        assert study.next_trial(held).number == 1
    trial.set_user_attr(module.WORKER, {"host": "elsewhere", "pid": 1, "seen": time.time() - module.STALE_S - 1})
    with ExitStack() as held:
        assert study.next_trial(held).number == 0


def test_equal_values_are_not_run_twice(make):
    space = {"train.schedule": Choices(("linear", "cosine"))}
    study = make(trials=8, space=space, sampler=replace(make().config.sampler, name="random"), name="few")
    values = run_all(study)
    assert sorted(each["train.schedule"] for each in values) == ["cosine", "linear"]
    trials = study.optuna.trials
    assert len(trials) == 8
    for trial in trials:
        twin = trials[trial.user_attrs.get(module.SAME_AS, trial.number)]
        assert (twin.params, twin.value) == (trial.params, trial.value)


def test_a_grid_runs_each_combination_once(make):
    space = {"train.schedule": Choices(("linear", "cosine")), "train.seed": Range(1, 3, False, None)}
    study = make(trials=None, space=space, sampler=replace(make().config.sampler, name="grid"), name="grid")
    assert study.budget() == 6
    values = run_all(study)
    assert len({json.dumps(each, sort_keys=True) for each in values}) == len(values) == 6


def test_values_that_do_not_fit_together_are_not_run(make):
    space = {"model.n_head": Choices((3, 4)), "model.n_embd": Choices((192, 256))}
    sampler = replace(make().config.sampler, name="random")
    study = make(trials=12, space=space, sampler=sampler, name="heads")
    values = run_all(study)
    assert {(each["model.n_head"], each["model.n_embd"]) for each in values} == {(3, 192), (4, 192), (4, 256)}


def test_a_space_without_values_that_fit_together_ends(make, monkeypatch):
    monkeypatch.setattr(module, "MAX_REJECTED", 20)
    study = make(trials=2, space={"model.n_head": Choices((3, 5))}, name="none")
    with pytest.raises(UserError, match=r"found no values to try in 20 attempts: .*n_embd 256 is not a multiple"):
        run_all(study)


def test_another_space_needs_another_name(make):
    make()
    with pytest.raises(UserError, match=r"was started with another space, .*give sweep.yaml another name"):
        make(space={"train.seed": Range(1, 3, False, None)})
    with pytest.raises(UserError, match="was started with another objective"):
        make(objective="train.last_val_loss")
    make(trials=99)  # a larger budget goes on


def test_a_foreign_study_is_left_alone(make, tmp_path):
    optuna.create_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/optuna.db")
    with pytest.raises(UserError, match=r"'sweep' was not made by a sweep; give sweep.yaml another name"):
        make()


def test_a_locked_database_is_one_line(make, tmp_path, monkeypatch):
    make()
    monkeypatch.setattr(module, "DATABASE_WAIT_S", 0.1)
    with sqlite3.connect(tmp_path / "optuna.db") as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="database is locked; close the program that holds it"):
            make(name="other")


def test_what_is_no_database_is_one_line(make, tmp_path, monkeypatch):
    (tmp_path / "optuna.db").write_text("a text" * 500)
    with pytest.raises(UserError, match="file is not a database") as caught:
        make()
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("OPTUNA_STORAGE", "optuna.db")
    with pytest.raises(UserError, match=r"OPTUNA_STORAGE is 'optuna.db'; expected an address"):
        make()


@pytest.mark.parametrize("name", ["tpe", "random", "gp", "qmc"])
def test_each_sampler_gives_values_of_the_space(make, name):
    study = make(trials=3, sampler=replace(make().config.sampler, name=name, startup_trials=1), name=name)
    values = run_all(study)
    assert len({json.dumps(each, sort_keys=True) for each in values}) == 3
    for each in values:
        assert each.keys() == study.config.space.keys()


def test_the_sampler_repeats_itself_with_its_seed(make):
    config = make().config
    distributions = {name: param.distribution() for name, param in config.space.items()}

    def first(number):
        return optuna.create_study(sampler=make_sampler(config, number)).ask(distributions).params

    assert first(0) == first(0) != first(1)


@pytest.mark.parametrize("name", ["asha", "median", "wilcoxon"])
def test_each_pruner_stops_a_trial_that_is_far_behind(name):
    pruner = make_pruner(PrunerConfig(name, startup_trials=2, min_steps=20, reduction_factor=3))
    study = optuna.create_study(pruner=pruner)
    pruned_at = []
    for offset in (0.0, 0.1, 0.2, 0.3, 5.0):
        trial = study.ask()
        pruned_at.append(None)
        for step in range(10, 201, 10):
            trial.report(10 + offset + offset * step / 100 - step / 100, step)
            if trial.should_prune():
                pruned_at[-1] = step
                break
        if pruned_at[-1]:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, offset)
    assert pruned_at[0] is None
    assert 20 <= pruned_at[-1] <= 60


def test_the_best_trial_is_complete():
    study = optuna.create_study()
    for value in (3.0, 1.0, 2.0):
        study.tell(study.ask(), value)
    trial = study.ask()
    trial.report(0.5, 1)
    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    assert best_of(study.trials, "minimize").value == 1.0
    assert best_of(study.trials, "maximize").value == 3.0
    assert best_of([], "minimize") is None


def test_the_commands_that_validate_import_no_optuna():
    program = "import sys; from experiments import sweep; print('optuna' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_committed_sweep_is_yaml_1_2():
    assert YAML(typ="safe").load((ROOT / "sweep.yaml").read_text())["name"] == "sweep"
