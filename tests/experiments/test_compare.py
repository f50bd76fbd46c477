import json
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.compare import aligned, as_json, compare, lines
from experiments.runs import find_run
from experiments.verdicts import BETTER, NOT_DISTINGUISHABLE, SAME, UNKNOWN, WORSE
from gpt2.__main__ import main
from gpt2.errors import UserError
from tests.conftest import ROOT
from tests.experiments.repository import Repository
from tests.project import Project

SEEDS = (1, 2, 3)


def losses(mean, seed):
    """Of a run: noise of the text, the same for all; of the seed; and of the seed in each segment."""
    generator = np.random.default_rng(seed)
    text = np.random.default_rng(99).normal(0, 0.3, 282)
    return mean + text + generator.normal(0, 0.01) + generator.normal(0, 0.06, 282)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    repository = Repository(tmp_path_factory.mktemp("compare") / "repository")
    for seed in SEEDS:
        speed, wide_speed = 4000 + 40 * seed, 3000 + 40 * seed
        repository.experiment(
            f"base-{seed}",
            losses(4.70, seed),
            train__seed=seed,
            train={"tokens_per_s": speed, "peak_memory_bytes": 10**9},
        )
        repository.experiment(
            f"wide-{seed}",
            losses(4.64, 10 + seed),
            train__seed=seed,
            model__n_embd=384,
            train={"tokens_per_s": wide_speed, "peak_memory_bytes": 1.3e9},
        )
    repository.experiment("near", losses(4.69, 20), train__seed=1, train__learning_rate=5.0e-3)
    repository.experiment("far", losses(4.50, 21), train__seed=1, train__learning_rate=9.0e-3)
    repository.experiment("alone", losses(4.70, 22), train__seed=1, text="text two")
    repository.experiment("alone-too", losses(4.60, 23), train__seed=1, train__learning_rate=9.0e-3, text="text two")
    repository.experiment("failed", train__seed=1, train__learning_rate=8.0e-3)
    return repository


@pytest.fixture
def command(repository, monkeypatch, capsys):
    """Runs the command; returns exit code, output and error."""
    monkeypatch.chdir(repository.folder)

    def run(*arguments):
        code = main(["compare", *arguments])
        return code, *capsys.readouterr()

    return run


def verdicts(command, *arguments):
    code, output, _ = command("--json", *arguments)
    assert code == 0
    return json.loads(output)["comparisons"][0]["verdicts"]


def names(prefix):
    return [f"{prefix}-{seed}" for seed in SEEDS]


def test_a_better_setting_is_found_and_seeds_are_one_row(command):
    code, output, error = command(*names("base"), *names("wide"))
    assert (code, error) == (0, "")
    header, base, wide = output.splitlines()[:3]
    assert header.split() == ["n", "loss", "bits", "per", "byte", "tokens/s", "peak", "memory", "model.n_embd"]
    assert base.startswith("base-1 and 2 more  3  4.7")
    assert wide.endswith("384")
    assert " is better than base-1 and 2 more: its loss is 0.0" in output
    assert max(map(len, output.splitlines())) <= 140
    found = verdicts(command, *names("base"), *names("wide"))
    assert {name: verdict["verdict"] for name, verdict in found.items()} == {
        "loss": BETTER,
        "bits per byte": BETTER,
        "tokens/s": WORSE,
        "peak memory": WORSE,
    }
    assert found["peak memory"]["value"] == pytest.approx(0.3)
    assert found["loss"]["low"] < found["loss"]["value"] < found["loss"]["high"] < 0
    assert found["loss"]["models_low"] > found["loss"]["low"]  # these models alone are known better
    assert found["loss"]["pairs"] == 3
    assert found["tokens/s"]["pairs"] == 0
    assert "share 3 seeds: compared in pairs" in output


def test_shared_seeds_find_what_the_spread_of_seeds_hides(repository):
    """A seed that changes both settings alike, by more than they differ."""
    runs = []
    for seed, shift in zip(SEEDS, (0.0, 0.05, 0.02), strict=True):
        for name, mean in (("plain", 4.70), ("tuned", 4.68)):
            learning_rate = {"plain": 6.0e-3, "tuned": 7.0e-3}[name]
            row = losses(mean, 0) + shift + np.random.default_rng(seed).normal(0, 0.01, 282)
            repository.experiment(
                f"{name}-{seed}", row, train__seed=seed, train__learning_rate=learning_rate, text="t3"
            )
            runs.append(find_run(f"{name}-{seed}", repository.folder))
    (comparison,), _ = compare(runs, [])
    assert comparison.verdicts[0].word == BETTER
    assert comparison.verdicts[0].change.value == pytest.approx(-0.02, abs=1e-4)
    (comparison,), settings = compare([*runs[:4], runs[4], runs[3]], [])  # two of them
    assert [len(setting.runs) for setting in settings] == [3, 2]
    assert comparison.verdicts[0].pairs == 0
    assert comparison.verdicts[0].word == NOT_DISTINGUISHABLE


def test_the_first_run_is_the_baseline(command):
    assert verdicts(command, *names("wide"), *names("base"))["loss"]["verdict"] == WORSE


def test_one_seed_each_is_judged_by_the_spread_of_other_settings(command):
    found = verdicts(command, "base-1", "near")
    assert found["loss"]["verdict"] == NOT_DISTINGUISHABLE
    assert found["loss"]["more_seeds"] > 1
    assert found["loss"]["spread"]["groups"] == 2
    assert verdicts(command, "base-1", "far")["loss"]["verdict"] == BETTER
    assert found["peak memory"]["verdict"] == SAME
    _, output, _ = command("base-1", "near")
    assert "near is not distinguishable from base-1 by its loss, " in output
    assert " more seeds of each would tell" in output


def test_one_seed_each_without_any_spread_cannot_tell(command):
    found = verdicts(command, "alone", "alone-too")
    assert found["loss"]["verdict"] == UNKNOWN
    assert found["loss"]["low"] is None
    _, output, _ = command("alone", "alone-too")
    assert "alone-too against alone: one seed each cannot tell" in output
    assert "dvc exp run --queue -S 'train.seed=1,2'" in output


def test_all_seeds_of_a_setting_are_found(command):
    _, output, _ = command("base-1", "wide-2", "--all-seeds")
    base, wide = output.splitlines()[1:3]
    assert base.startswith("base-1 and 2 more  3")
    assert wide.startswith("wide-2 and 2 more  3")


def test_several_comparisons_are_each_on_the_safer_side(command):
    alone = verdicts(command, "base-1", "near")["loss"]
    _, output, _ = command("--json", "base-1", "near", "far", "wide-1")
    content = json.loads(output)
    assert content["level"] == pytest.approx(0.03 / 3)
    assert [each["other"] for each in content["comparisons"]] == ["near", "far", "wide-1"]
    together = content["comparisons"][0]["verdicts"]["loss"]
    assert together["high"] - together["low"] > alone["high"] - alone["low"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base-1", "alone"], "have different held-out texts"),
        (["base-1", "failed"], "failed has no readable reports/evaluate/segment_losses.json"),
        (["base-1", "gone"], "there is no experiment"),
        (["base-1", "base-2"], "one setting, there is nothing to compare it with"),
        (["base-1"], "one setting, there is nothing to compare it with"),
        (["base-1", "main"], "main has no readable reports/evaluate/segment_losses.json"),
    ],
)
def test_what_cannot_be_compared_is_one_line(command, arguments, message):
    code, output, error = command(*arguments)
    assert (code, output) == (2, "")
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_damaged_file_is_told(command, repository):
    repository.experiment("damaged", train__seed=1, train__learning_rate=7.0e-3)
    repository.write("reports/evaluate/segment_losses.json", '{"losses": [1')
    code, _, error = command("base-1", "workspace")
    repository.git("clean", "-fdq")
    assert code == 2
    assert "workspace has no readable reports/evaluate/segment_losses.json" in error


def test_it_takes_seconds_and_no_torch(repository):
    program = (
        "import sys; from gpt2.__main__ import main; code = main(sys.argv[1:]); "
        "print(code, {'torch', 'dvc', 'mlflow'} & set(sys.modules))"
    )
    start_s = time.process_time()
    command = [sys.executable, "-c", program, "compare", *names("base"), *names("wide")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=repository.folder, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 set()\n")
    assert time.process_time() - start_s < 5


def test_runs_without_speed_are_compared_by_loss(repository):
    runs = [find_run(name, repository.folder) for name in ("base-1", "base-2", "wide-1", "wide-2")]
    vars(runs[0])["train_metrics"] = {}
    comparisons, settings = compare(runs, [])
    assert [verdict.metric.name for verdict in comparisons[0].verdicts] == ["loss", "bits per byte"]
    assert "-" in lines(settings, comparisons)[1].split()
    assert as_json(settings, comparisons)["settings"][0]["values"]["tokens/s"] == []


def test_one_setting_is_nothing_to_compare(repository):
    with pytest.raises(UserError, match="one setting"):
        compare([find_run("base-1", repository.folder)], [])


def test_cells_are_aligned():
    assert aligned([["", "n"], ["long name", "10"], ["a", "2"]]) == ["            n", "long name  10", "a           2"]


@pytest.mark.slow
def test_real_experiments_are_compared(tmp_path):
    project = Project(tmp_path)
    runs = {"a-1": (1, 12), "a-2": (2, 12), "b-1": (1, 6), "b-2": (2, 6)}
    for name, (seed, steps) in runs.items():
        project.run(
            "dvc", "exp", "run", "evaluate", "-n", name, "-S", f"train.seed={seed}", "-S", f"train.max_steps={steps}"
        )
    content = json.loads(project.run("python", "-m", "gpt2", "compare", "--json", *runs))
    assert [len(setting["runs"]) for setting in content["settings"]] == [2, 2]
    assert content["differing_params"] == ["train.max_steps"]
    assert content["comparisons"][0]["verdicts"]["loss"]["verdict"] == WORSE  # half the steps
    # the experiments are those of MLflow
    ids = {run.info.run_name: run.info.run_id for run in project.runs()}
    in_mlflow = json.loads(project.run("python", "-m", "gpt2", "compare", "--json", *(ids[name] for name in runs)))
    for found, expected in zip(in_mlflow["settings"], content["settings"], strict=True):
        assert found["values"] == expected["values"]
    assert in_mlflow["comparisons"][0]["verdicts"]["loss"]["verdict"] == WORSE
