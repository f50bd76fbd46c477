import json
import re
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from experiments import ladder
from experiments.scaling.law import Law
from experiments.sweeping.config import load_sweep
from experiments.sweeping.space import grid
from gpt2.errors import UserError
from tests.conftest import ROOT
from tests.project import TINY, Project

LAW = Law(E=2.0, A=30.0, alpha=0.2, B=60.0, beta=0.25)


@pytest.fixture(scope="module")
def committed():
    return load_sweep(ROOT / "ladder.yaml", ROOT / "params.yaml")


@pytest.fixture(scope="module")
def trained(committed):
    """The runs of the committed ladder, as if their losses followed a law."""
    config, base = committed
    runs = [ladder.try_params(config, base, values) for values in grid(config.space)]
    return [
        (params, LAW.loss(params.model.num_parameters(), params.train.tokens_per_step * params.train.max_steps))
        for params in runs
    ]


@pytest.fixture(scope="module")
def target():
    return ladder.load_target(ROOT / "presets/gpu.yaml", "h100", 1)


def test_the_committed_ladder_is_one(committed):
    config, _ = committed
    ladder.check(config, Path("ladder.yaml"), None)
    for changed in (
        replace(config, objective="train.tokens_per_s"),
        replace(config, sampler=replace(config.sampler, name="tpe")),
        replace(config, pruner=replace(config.pruner, name="asha")),
    ):
        with pytest.raises(UserError, match=r"ladder\.yaml: .*a ladder"):
            ladder.check(changed, Path("ladder.yaml"), None)
    with pytest.raises(UserError, match=r"ladder\.yaml: train\.patience is 3; set it to null"):
        ladder.check(config, Path("ladder.yaml"), 3)


def test_it_predicts_loss_and_cost(trained, target, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = ladder.predict(trained, target, 10**9)
    truth = LAW.loss(target.parameters, target.tokens)
    assert result.predicted.value == pytest.approx(truth, rel=0.01)
    assert truth in result.predicted
    assert [point.loss in interval for point, interval in result.left_out] == [True] * 3
    ladder.write(result)
    content = json.loads((ladder.REPORT / "ladder.json").read_text())
    assert content["target"]["loss"]["value"] == result.predicted.value
    assert content["target"]["hours"] > 0
    assert len(content["runs"]) == 12
    text = (ladder.REPORT / "ladder.md").read_text()
    assert "3 of 3 of them are inside" in text
    assert f"validation loss {result.predicted.value:.3f} (" in text
    assert (ladder.REPORT / "ladder.png").stat().st_size > 10_000


def test_what_differs_from_the_large_run_is_told(trained, target):
    result = ladder.predict(trained, target, 300_000)
    assert "train.batch_size is 16 in gpu and 1 in the small runs" in result.notes
    (text,) = [note for note in result.notes if "times" in note]  # 1,024,000 tokens are less than four times the text
    assert text.startswith("gpu sees the text 218 times")
    assert "16.4M training tokens" in text
    assert not [note for note in ladder.predict(trained, target, None).notes if "times" in note]


def test_too_few_sizes_are_an_error(trained, target):
    with pytest.raises(
        UserError, match="a ladder needs 4 sizes, one of them to check the fit to the others; there are 3"
    ):
        ladder.predict(trained[:9], target, None)


def test_a_run_that_does_not_fit_is_told(trained):
    xl = ladder.load_target(ROOT / "presets/gpt2-xl-8gpu.yaml", "t4", 1)
    assert "it does not fit 1 x NVIDIA T4" in "\n".join(ladder.describe(ladder.predict(trained, xl, None)))


def test_wrong_arguments_are_errors_before_anything_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("experiments.sweep.run", lambda _: pytest.fail("it ran"))
    arguments = {
        "file": Path("ladder.yaml"),
        "target": Path("presets/gpu.yaml"),
        "gpu": "h100",
        "gpus": 1,
        "workers": 1,
    }
    for changes, expected in (
        ({"target": Path("presets/none.yaml")}, "none.yaml is missing"),
        ({"gpu": "h1000"}, "no GPU 'h1000'"),
        ({"gpus": 0}, "--gpus is 0"),
        ({"file": Path("sweep.yaml")}, "a ladder needs sampler.name grid"),
    ):
        with pytest.raises(UserError, match=expected):
            ladder.run(Namespace(**{**arguments, **changes}, dry_run=False))


@pytest.mark.slow
def test_a_ladder_of_tiny_runs(tmp_path):
    project = Project(tmp_path)
    project.write_params((ROOT / "presets/gpu.yaml").read_text(), TINY)
    (project.folder / "large.yaml").write_text((project.folder / "params.yaml").read_text())
    content = YAML(typ="safe").load((ROOT / "ladder.yaml").read_text())
    content["set"] = {"train.eval_interval": 8}
    content["space"] = {
        "model.n_embd, model.n_layer": [[4, 1], [8, 1], [16, 1], [24, 2]],
        "train.max_steps, train.warmup_steps": [[8, 0], [16, 0]],
    }
    with (project.folder / "ladder.yaml").open("w") as file:
        YAML().dump(content, file)
    command = (sys.executable, "-m", "gpt2", "ladder", "--target", "large.yaml", "--gpu", "t4")
    assert "grid of 8 trials" in project.run(*command, "--dry-run")
    output = project.run(*command)
    assert "of 2 of them are inside the 95 % interval" in output
    assert "MLflow does not answer" not in output
    found = project.read("reports/ladder/ladder.json")
    assert len(found["runs"]) == 8
    assert found["target"]["loss"]["low"] < found["target"]["loss"]["high"]
    assert re.search(r"^trial \d", output, re.MULTILINE)
    assert not re.search(r"^trial \d", project.run(*command), re.MULTILINE)  # nothing is trained again
    assert project.read("reports/ladder/ladder.json") == found
