"""`python -m gpt2 sweep` with real runs: DVC, MLflow and Optuna have the same trials with the same numbers."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from gpt2.__main__ import main
from tests.conftest import ROOT
from tests.project import Project

SWEEP = """
name: tiny
objective: train.best_val_loss
direction: minimize
sampler: {{name: random, seed: 1, startup_trials: 4}}
pruner: {pruner}
budget: {{trials: {trials}, minutes: null}}
set: {{train.max_steps: {steps}, train.eval_interval: 10, train.warmup_steps: 0}}
space:
  train.learning_rate: {{low: 1.0e-3, high: 1.0e-1, log: true}}
  train.weight_decay: {{low: 0.0, high: 0.2}}
"""
NO_PRUNER = "{name: none, startup_trials: 2, min_steps: 10, reduction_factor: 2}"
ASHA = "{name: asha, startup_trials: 2, min_steps: 10, reduction_factor: 2}"
COMMAND = [sys.executable, "-m", "gpt2", "sweep"]


@pytest.fixture
def project(tmp_path):
    project = Project(tmp_path)
    project.run("dvc", "repro", "tokenize")
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "tokens")
    return project


def write(project, *, trials, steps=40, pruner=NO_PRUNER):
    (project.folder / "sweep.yaml").write_text(SWEEP.format(trials=trials, steps=steps, pruner=pruner))


def experiments(project):
    """best_val_loss of each experiment that `dvc exp show` knows."""
    table = csv.DictReader(io.StringIO(project.run("dvc", "exp", "show", "--csv")))
    return {row["Experiment"]: float(row["best_val_loss"]) for row in table if row["typ"].startswith("branch")}


def mlflow_runs(project):
    """The lowest validation loss of each run in MLflow but the sweep's own."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    found = {}
    for run in project.runs():
        if run.info.run_name != "sweep tiny":
            assert run.data.tags["dvc.experiment"] not in found
            losses = client.get_metric_history(run.info.run_id, "val/loss")
            lowest = found[run.data.tags["dvc.experiment"]] = min(metric.value for metric in losses)
            assert run.data.metrics["sweep/objective"] == lowest
    return found


def trials(project):
    import optuna

    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{project.folder / 'optuna.db'}")
    return study.get_trials()


def workers(sweep):
    """The processes that run trials."""
    children = psutil.Process(sweep.pid).children()
    return [child for child in children if "experiments.sweeping.worker" in " ".join(child.cmdline())]


@contextmanager
def running(project, *options):
    """A sweep in the background, which does not outlive the test."""
    sweep = subprocess.Popen(
        [*COMMAND, *options], cwd=project.folder, env=project.environment, stderr=subprocess.PIPE, text=True
    )
    try:
        yield sweep
    finally:
        sweep.terminate()
        sweep.wait()


def wait_until(condition, process, seconds=600):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.fixture
def sweep_here(tmp_path, monkeypatch, capsys):
    """Runs the command in a copy of the project's params and reports; returns its exit code and what it says."""
    for name in ("params.yaml", "dvc.yaml", "dvc.lock", "sweep.yaml", "reports/train/metrics.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / ".dvc").mkdir()
    for command in (["init", "-q", "-b", "main"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    author = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    subprocess.run(["git", *author, "commit", "-qm", "start"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)

    def run(*options):
        code = main(["sweep", *options])
        return code, capsys.readouterr().err

    return run


def edit(old, new):
    text = Path("sweep.yaml").read_text()
    assert old in text
    Path("sweep.yaml").write_text(text.replace(old, new))


def test_a_dry_run_shows_the_space_and_the_expected_minutes_and_leaves_nothing(sweep_here, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, told = sweep_here("--dry-run")
    assert code == 0
    assert "train.learning_rate: 0.001 to 0.02, log (now 0.012)" in told
    assert re.search(r"24 trials, about [0-9.]+ minutes of training for each trial", told)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_lists_a_grid(sweep_here):
    text = Path("sweep.yaml").read_text().partition("space:")[0].replace("name: tpe", "name: grid")
    Path("sweep.yaml").write_text(text + "space:\n  train.seed: [1, 2, 3]\n  train.schedule: [linear, cosine]\n")
    code, told = sweep_here("--dry-run")
    assert code == 0
    assert "grid of 6 trials" in told
    assert told.count("train.seed ") == 6


@pytest.mark.parametrize(
    ("old", "new", "options", "expected"),
    [
        ("train.beta2:", "train.beta_2:", [], "unknown key train.beta_2; did you mean 'beta2'?"),
        ("low: 0.9, high: 0.99", "low: 0.99, high: 0.9", [], "low 0.99 is not below high 0.9"),
        ("objective: train.best_val_loss", "objective: train.loss", [], "'train.loss', which no stage writes"),
        ("name: sweep", "name: sweep", ["--resume"], "there is no study 'sweep' to resume"),
        ("name: sweep", "name: sweep", ["--workers", "0"], "--workers is 0; expected 1 to 64"),
        ("name: sweep", "name: sweep", ["--file", "none.yaml"], "none.yaml is missing; docs/experiments.md"),
    ],
)
def test_what_is_wrong_ends_with_one_line_and_nothing_started(sweep_here, old, new, options, expected):
    edit(old, new)
    code, told = sweep_here(*options)
    assert code == 2
    assert expected in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1


def test_experiments_of_an_earlier_sweep_are_not_overwritten(sweep_here):
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    ref = f"refs/exps/{head[:2]}/{head[2:]}/sweep-004"
    subprocess.run(["git", "update-ref", ref, head], check=True)
    code, told = sweep_here()
    assert code == 2
    assert "give sweep.yaml another name, or remove them: dvc exp remove sweep-004" in told


def test_it_needs_the_root_of_the_repository(sweep_here, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, told = sweep_here()
    assert code == 2
    assert "elsewhere is not the root of the project's repository: change to its folder" in told


@pytest.mark.slow
def test_eight_trials_of_two_workers_are_the_same_in_dvc_mlflow_and_optuna_after_two_kills(project):
    write(project, trials=8, steps=300)
    with running(project, "--workers", "2") as sweep:
        for number in (1, 3):  # when so many trainings have checkpoints
            wait_until(lambda: len(set(project.folder.glob("checkpoints/*/step-*"))) >= number, sweep)  # noqa: B023
            wait_until(lambda: workers(sweep), sweep)[0].kill()
            time.sleep(3)
        output = sweep.stderr.read()
        assert sweep.wait() == 0, output
    assert "Traceback" not in output
    assert output.count("a worker was killed") == 2

    known = trials(project)
    assert [trial.state.name for trial in known] == ["COMPLETE"] * 8
    in_optuna = {f"tiny-{trial.number:03d}": trial.value for trial in known}
    assert experiments(project) == pytest.approx(in_optuna, rel=1e-6)
    project.run(sys.executable, "-m", "stages.sync")
    assert mlflow_runs(project) == pytest.approx(in_optuna, rel=1e-12)
    assert project.run("git", "status", "--porcelain").split() == ["??", "reports/", "??", "sweep.yaml"]
    histories = [path.read_text().splitlines() for path in project.folder.glob("checkpoints/*/history.jsonl")]
    assert [[json.loads(row)["step"] for row in rows] for rows in histories] == [list(range(10, 301, 10))] * 8

    # the best one again, without what the trials share
    best = min(in_optuna, key=in_optuna.get)
    assert f"dvc exp apply {best}" in output
    values = known[int(best[-3:])].params | {"train.max_steps": 300, "train.eval_interval": 10, "train.warmup_steps": 0}
    (project.folder / "checkpoints").rename(project.folder / "before")
    changes = [word for name, value in values.items() for word in ("-S", f"{name}={value}")]
    project.run("dvc", "exp", "run", "--temp", "--force", "-n", "again", *changes, "train")
    assert experiments(project)["again"] == in_optuna[best]  # to the bit


@pytest.mark.slow
def test_a_bad_trial_is_pruned_and_remains_an_experiment(project):
    write(project, trials=6, steps=600, pruner=ASHA)
    output = project.run(*COMMAND)
    known = trials(project)
    pruned = [trial for trial in known if trial.state.name == "PRUNED"]
    assert pruned
    assert "WARNING" not in output  # the stages forked
    table = experiments(project)
    assert len(table) == 6
    for trial in pruned:
        assert trial.last_step < 600
        assert f"trial {trial.number}: pruned at step {trial.last_step}" in output
        assert table[f"tiny-{trial.number:03d}"] == pytest.approx(min(trial.intermediate_values.values()), rel=1e-6)
    assert project.run(*COMMAND).count("trial ") <= 2  # nothing is run twice
    assert (project.folder / "reports/sweep/tiny/trials.csv").read_text().count("PRUNED") == len(pruned)
    page = (project.folder / "reports/sweep/tiny/plots.html").read_text()
    assert "tiny-000" in (project.folder / "reports/sweep/tiny/report.html").read_text()
    assert "train.learning_rate" in page
    assert not re.search(r"<script[^>]+src=", page)


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_where_it_was(project):
    write(project, trials=2, steps=500)
    with running(project) as sweep:
        wait_until(lambda: list(project.folder.glob("checkpoints/*/step-*")), sweep)
        sweep.terminate()
        output = sweep.stderr.read()
        assert sweep.wait() == 143, output
    assert "interrupted after 0 trials; the same command goes on" in output
    assert [trial.state.name for trial in trials(project)] == ["RUNNING"]
    output = project.run(*COMMAND, "--resume")
    assert [trial.state.name for trial in trials(project)] == ["COMPLETE"] * 2
    log = (project.folder / ".dvc/tmp/sweeps/tiny/trial-000.log").read_text()
    assert "resuming from step" in log
    assert len(experiments(project)) == len(mlflow_runs(project)) == 2
