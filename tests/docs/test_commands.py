"""The commands of README and docs: each exists, and a test runs it with the same options.

The commands of DVC that need no run of the pipeline run here, on the committed reports. Those that do run in
tests/stages/test_pipeline.py.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from itertools import takewhile

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()
RUN_DVC = (
    "tests/stages/test_pipeline.py",
    "tests/stages/test_links.py",
    "tests/docs/test_commands.py",
    "tests/launch/test_results.py",
    "tests/experiments/test_remotes.py",
    "tests/experiments/test_report_in_browser.py",
)
RUN_GPT2 = (
    "tests/gpt2/test_main.py",
    "tests/gpt2/hub/test_publish.py",
    "tests/gpt2/planning/test_command.py",
    "tests/experiments/test_compare.py",
    "tests/experiments/test_reproduce.py",
    "tests/experiments/test_ladder.py",
    "tests/experiments/test_sweep.py",
    "tests/experiments/test_report.py",
    "tests/experiments/test_registry.py",
    "tests/experiments/test_preset.py",
)
RUN_MLFLOW = ("tests/stages/test_mlflow_model.py",)
RUN_STAGES = ("tests/stages/test_pipeline.py", "tests/stages/test_tracking.py")
GROUPS = ("exp", "metrics", "plots", "queue", "remote")
LONG = {"-S": "--set-param", "-n": "--name", "-f": "--force", "-j": "--jobs"}
# Commands that no test runs.
NOT_RUN = {
    "dvc queue start -j 1": "it leaves a worker in the background; a slow test uses dvc exp run --run-all",
    "dvc queue start -j 2": "the same; benchmarks/concurrency.py runs it",
    "source .venv/bin/activate": "the tests run in an environment",
    "python -m pytest": "it is what runs the tests",
    "hf auth login": "it needs an account",
    "tail -f checkpoints/*/history.jsonl": "it does not end; tests/stages/test_pipeline.py reads these files",
    "torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --rdzv-id=ID "
    "--max-restarts=3 -m stages.train": "it needs two nodes",
    "sbatch launch/slurm.sh": "it needs Slurm; tests/launch/test_slurm.py runs the script",
    "sbatch --nodes=4 --time=2:00:00 --partition=NAME launch/slurm.sh": "the same",
    "sky jobs launch launch/skypilot.yaml --env BUCKET=s3://your-bucket": "it needs an account",
    "aws s3 cp s3://your-bucket/results.tar .": "the same",
}


def commands():
    """Page and words of each shell command: indented lines, also those of a notebook, and code within a sentence."""
    start = r"(?:make|dvc|python|hf|source|tail|mlflow|torchrun|sbatch|sky|aws) "
    for page in PAGES:
        text = page.read_text()
        for line in re.findall(rf"^    !?({start}.*)", text, re.MULTILINE) + re.findall(rf"`({start}[^`]*)`", text):
            for command in line.split(" && "):
                yield page.name, shlex.split(command, comments=True)


def options(words):
    """The options among words, in their long form."""
    return {LONG.get(word, word) for word in words if re.match(r"-{1,2}[a-zA-Z]", word)}


@cache
def sequences(paths):
    """The texts of each call, list and tuple in test files: `run("dvc", "repro")` is ["dvc", "repro"]."""
    found = []
    for path in paths:
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            parts = node.args if isinstance(node, ast.Call) else getattr(node, "elts", [])
            found.append(
                [each.value for each in parts if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            )
    return found


def dvc_command(words):
    """Subcommand and options."""
    count = 2 if words[1:2] and words[1] in GROUPS else 1
    return words[1 : 1 + count], options(words)


def is_run(words):
    """Whether a test runs a command, or one with the same subcommand and more options."""
    match words:
        case ["dvc", *_]:
            subcommand, needed = dvc_command(words)
            found = [dvc_command(each) for each in sequences(RUN_DVC) if each[:1] == ["dvc"]]
            return any(theirs == subcommand and needed <= given for theirs, given in found)
        case ["python", "-m", "gpt2", *rest]:
            subcommand = [*takewhile(lambda word: word[0] not in "-.", rest)]
            texts = {text for each in sequences(RUN_GPT2) for text in each}
            return {*subcommand, *options(rest)} <= texts
        case ["mlflow", *rest]:
            subcommand = [*takewhile(lambda word: word[0] != "-", words)]
            calls = [each for each in sequences(RUN_MLFLOW) if each[: len(subcommand)] == subcommand]
            return any(options(rest) <= options(each) for each in calls)
        case ["python", "-m", module, *_] if module.startswith("stages."):
            return any(each[:1] == ["-m"] and module in each for each in sequences(RUN_STAGES))
    return False


def exists(words):
    """Whether a command is a target of make, or a program of ours for developers."""
    match words:
        case ["make", target, *_]:
            return re.search(rf"^{target}:.*##", MAKEFILE, re.MULTILINE) is not None
        case ["python", "-m", module, *_] if module.startswith(("benchmarks.", "tools.")):
            return (ROOT / f"{module.replace('.', '/')}.py").is_file()
    return False


def test_a_test_runs_each_command_of_the_docs():
    found = list(commands())
    assert len(found) > 40
    not_run = {" ".join(words) for _, words in found if not is_run(words) and not exists(words)}
    assert not_run == NOT_RUN.keys()


@pytest.mark.parametrize(
    ("command", "run"),
    [
        ("dvc repro", True),
        ("dvc exp run --temp -S train.max_steps=9", True),
        ("dvc exp run --temp --jobs 2", False),
        ("dvc exp branch mine", False),
        ("python -m gpt2 generate --prompt x --stats", True),
        ("python -m gpt2 generate --beams 4", False),
        ("python -m gpt2 translate", False),
        ("python -m stages.train", True),
        ("python -m stages.evaluate --fast", False),
    ],
)
def test_what_no_test_runs_is_noticed(command, run):
    assert is_run(command.split()) == run


DVC_COMMANDS = (
    ["dvc", "metrics", "show"],
    ["dvc", "metrics", "diff"],
    ["dvc", "plots", "diff"],
    ["dvc", "exp", "save", "--name", "longer"],
    ["dvc", "exp", "apply", "longer"],
    ["dvc", "exp", "run", "--queue", "train", "--name", "tune-wide", "-S", "model.n_embd=384"],
)
IN_ONE_PROCESS = """
import contextlib, io, json, sys
from dvc.cli import main
outputs = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        if command[1:3] == ["exp", "apply"]:
            open("params.yaml", "w").write(open("presets/seed.yaml").read())
        code = main(command[1:])
    outputs.append([code, output.getvalue()])
open(sys.argv[2], "w").write(json.dumps(outputs))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The committed reports, and in the working tree more steps; what DVC says of them, by command."""
    folder = tmp_path_factory.mktemp("repository")
    for name in (".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore", "params.yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    for name in ("reports", "presets"):
        shutil.copytree(ROOT / name, folder / name)
    plots = (ROOT / "dvc.yaml").read_text().partition("stages:")[0]
    stage = {"cmd": "true", "params": ["model", "train"], "metrics": [{"reports/train/metrics.json": {"cache": False}}]}
    (folder / "dvc.yaml").write_text(f"{plots}stages: {json.dumps({'train': stage})}")
    author = {f"GIT_{who}_{what}": "me@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "GIT_"))}
    environment = {**kept, **author, "DVC_NO_ANALYTICS": "1"}
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "start"]):
        subprocess.run(["git", *command], cwd=folder, env=environment, check=True)
    metrics = json.loads((folder / "reports/train/metrics.json").read_text())
    (folder / "reports/train/metrics.json").write_text(json.dumps(metrics | {"steps": 901}))
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("max_steps: 900", "max_steps: 901"))
    program = [sys.executable, "-c", IN_ONE_PROCESS, json.dumps(DVC_COMMANDS), "outputs.json"]
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outputs = json.loads((folder / "outputs.json").read_text())
    assert [code for code, _ in outputs] == [0] * len(DVC_COMMANDS), done.stderr
    return folder, {" ".join(words[1:3]): text for words, (_, text) in zip(DVC_COMMANDS, outputs, strict=True)}


def test_metrics_and_plots_compare_with_the_last_commit(repository):
    folder, told = repository
    assert "best_val_loss" in told["metrics show"]
    assert re.search(r"train/metrics.json +steps +900 +901 +1\n", told["metrics diff"])
    page = (folder / "dvc_plots/index.html").read_text()
    for plot in ("learning rate", "gradient norm"):
        assert plot in page


def test_an_experiment_is_adopted_by_its_name(repository):
    folder, _ = repository
    assert "max_steps: 901" in (folder / "params.yaml").read_text()  # before, it was another preset


def test_a_queued_experiment_waits_under_its_name(repository):
    folder, _ = repository
    log = ["git", "reflog", "show", "refs/exps/celery/stash"]
    assert "tune-wide" in subprocess.run(log, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_a_preset_becomes_the_params(tmp_path):
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    make = ["make", "--no-print-directory", "preset"]
    subprocess.run([*make, "NAME=seed"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "params.yaml").read_bytes() == (ROOT / "presets/seed.yaml").read_bytes()
    wrong = subprocess.run([*make, "NAME=large"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2
    names = [path.stem for path in sorted((ROOT / "presets").glob("*.yaml"))]
    assert f"There is no preset 'large'; there are: {' '.join(names)} auto" in wrong.stdout
    shown = [*make, "--dry-run", "--assume-old=setup", "NAME=auto", "MINUTES=3", "SOURCE=my text.txt"]
    done = subprocess.run(shown, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert 'python -m gpt2 preset auto --minutes "3" --source "my text.txt"' in done.stdout
