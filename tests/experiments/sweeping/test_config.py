"""sweep.yaml: whatever is wrong is one line that says what to do, before anything runs."""

import json
from dataclasses import fields

import pytest
from ruamel.yaml import YAML

from experiments.sweeping.config import LOSSES, METRICS, load_sweep, try_params
from experiments.sweeping.space import grid
from gpt2.errors import UserError
from gpt2.evaluation.scores import Scores
from tests.conftest import ROOT


@pytest.fixture
def load(tmp_path):
    """Loads the committed sweep.yaml with changes."""

    def load_changed(**changes):
        content = YAML(typ="safe").load((ROOT / "sweep.yaml").read_text())
        for key, value in changes.items():
            if isinstance(value, dict) and key != "space":
                content[key] = {**(content[key] or {}), **value}
            else:
                content[key] = value
        path = tmp_path / "sweep.yaml"
        with path.open("w") as file:
            YAML().dump(content, file)
        return load_sweep(path, ROOT / "params.yaml")

    return load_changed


def test_the_committed_sweep_is_valid(load):
    config, base = load()
    assert config.stage == "train"
    assert len(config.space) == 6
    assert not isinstance(try_params(config, base, {}), str)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"space": {"model.n_layer, model.n_embd": [[2, 64], [4]]}}, "contains [4]; expected a list of 2 values"),
        ({"space": {"model.n_layer, model.n_embd": [2, 4]}}, "contains 2; expected a list of 2 values"),
        ({"space": {"model.n_layer, model.n_embd": [[2, 64], [2, 64]]}}, "has 1 values twice"),
        ({"space": {"model.n_layer, model.n_embed": [[2, 64], [4, 64]]}}, "unknown key model.n_embed; did you mean"),
        ({"space": {"model.n_layer, model.n_embd": [[2, 64], [4, "a"]]}}, "model.n_embd is 'a'"),
        ({"space": {"model.n_layer, model.n_layer": [[2, 64], [4, 32]]}}, "model.n_layer stands twice"),
        ({"space": {"train.learing_rate": [0.1, 0.2]}}, "unknown key train.learing_rate; did you mean"),
        ({"space": {"trian.learning_rate": [1.0e-3, 2.0e-3]}}, "unknown key trian; did you mean 'train'?"),
        ({"space": {"learning_rate": [0.1, 0.2]}}, "'learning_rate' is no param; did you mean 'train.learning_rate'?"),
        ({"space": {"train.learning_rate": {"low": 0.1, "high": 0.01}}}, "low 0.1 is not below high 0.01; swap them"),
        ({"space": {"train.learning_rate": {"low": -0.1, "high": 0.01}}}, "train.learning_rate is -0.1"),
        ({"space": {"train.learning_rate": {"low": 0.0, "high": 0.01, "log": True}}}, "log needs a low over 0"),
        ({"space": {"train.learning_rate": {"low": 0.1, "hihg": 0.2}}}, "unknown key 'hihg'; did you mean 'high'?"),
        ({"space": {"train.learning_rate": {"low": 0.1}}}, "high is None; expected a number"),
        ({"space": {"train.learning_rate": {"low": "1e-3", "high": 0.1}}}, "low is '1e-3'; expected a number"),
        ({"space": {"train.learning_rate": 0.1}}, "expected a list of values, or low and high"),
        ({"space": {"train.learning_rate": [0.1]}}, "at least two different values"),
        ({"space": {"train.learning_rate": [0.1, 0.1]}}, "at least two different values"),
        ({"space": {"train.schedule": ["linear", "cosin"]}}, "train.schedule is 'cosin'; expected"),
        ({"space": {"train.warmup_steps": {"low": 0.5, "high": 9.5}}}, "train.warmup_steps is 0.5; expected"),
        ({"space": {"train.warmup_steps": {"low": 0, "high": 9, "step": 20}}}, "step is 20; expected an integer"),
        ({"space": {"runtime.threads": [1, 2]}}, "runtime.threads does not change the results"),
        ({"space": {}}, "expected params with their ranges"),
        ({"set": {"train.schedule": "linear"}}, "train.schedule stands twice in set and space"),
        ({"set": {"train.eval_interval": 0}}, "set: train.eval_interval is 0; expected"),
        ({"objective": "train.best_val_los"}, "no stage writes; did you mean 'train.best_val_loss'?"),
        ({"objective": "bits_per_byte"}, "did you mean 'evaluate.bits_per_byte'?"),
        ({"objective": "export.size"}, "which no stage writes"),
        ({"direction": "minimise"}, "direction is 'minimise'; expected one of minimize, maximize; did you mean"),
        ({"direction": "maximize"}, "cannot foretell maximize train.best_val_loss; set it to none"),
        ({"objective": "train.tokens_per_s", "direction": "maximize"}, "pruner.name is 'asha'"),
        ({"sampler": {"name": "bayes"}}, "sampler.name is 'bayes'; expected one of tpe"),
        ({"sampler": {"name": "grid"}}, "space.train.learning_rate is continuous"),
        ({"sampler": {"seeds": 3}}, "unknown key sampler.seeds; did you mean 'seed'?"),
        ({"pruner": {"min_steps": 0}}, "pruner.min_steps is 0; expected an integer of at least 1"),
        ({"budget": {"trials": None}}, "neither trials nor minutes"),
        ({"budget": {"trials": 2.5}}, "budget.trials is 2.5; expected an integer"),
        ({"budget": {"minutes": -3}}, "budget.minutes is -3"),
        ({"name": "my sweep"}, "name is 'my sweep'; expected letters, digits"),
        ({"sampler": None}, "sampler is None; expected a section"),
        ({"nam": "x"}, "unknown key nam; did you mean 'name'?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(load, changes, expected):
    with pytest.raises(UserError) as caught:
        load(**changes)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "sweep.yaml" in str(caught.value)


def test_a_missing_file_says_where_it_is_described(tmp_path):
    with pytest.raises(UserError, match=r"sweep.yaml is missing; docs/experiments.md describes it"):
        load_sweep(tmp_path / "sweep.yaml", ROOT / "params.yaml")


def test_values_that_do_not_fit_together_are_told_for_their_trial(load):
    config, base = load(space={"model.n_head": [3, 4], "model.n_embd": [192, 256]})
    assert try_params(config, base, {"model.n_head": 3, "model.n_embd": 192}).model.n_head == 3
    assert "n_embd 256 is not a multiple of n_head 3" in try_params(config, base, {"model.n_head": 3})


def test_whole_ends_of_a_fraction_are_a_continuous_range(load):
    config, _ = load(space={"train.weight_decay": {"low": 0, "high": 1}})
    assert not config.space["train.weight_decay"].is_integer


def test_objectives_are_numbers_that_the_reports_have():
    train, evaluate = (json.loads((ROOT / f"reports/{name}/metrics.json").read_text()) for name in METRICS)
    assert {type(train[name]) for name in METRICS["train"]} <= {int, float}
    assert {type(evaluate[name]) for name in METRICS["evaluate"]} <= {int, float}
    assert {field.name for field in fields(Scores)} - {"tokens", "bytes"} <= set(METRICS["evaluate"])
    assert {name.partition(".")[2] for name in LOSSES} <= {*METRICS["train"], *METRICS["evaluate"]}


def test_params_can_change_together(load):
    config, base = load(space={"model.n_layer,  model.n_head, model.n_embd": [[2, 1, 64], [3, 3, 96]]})
    (name,) = config.space
    values = list(grid(config.space))
    assert values == [{name: "[2, 1, 64]"}, {name: "[3, 3, 96]"}]
    params = try_params(config, base, values[1])
    assert (params.model.n_layer, params.model.n_head, params.model.n_embd) == (3, 3, 96)
