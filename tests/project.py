"""A temporary repository with this code and tiny params, for tests that run the real commands."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from tests.conftest import ROOT, our_text
from tests.warm import warm_python

COPIED = (
    "dvc.yaml",
    ".dvcignore",
    ".gitignore",
    ".dvc/config",
    ".dvc/.gitignore",
    "gpt2",
    "stages",
    "experiments",
    "space",
    "data/linked/.gitkeep",
)
TINY = {
    "corpus": {"source": "mine.txt", "fallback": None},
    "model": {"block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16},
    "train": {
        "batch_size": 4,
        "sequence_length": 16,
        "max_steps": 12,
        "warmup_steps": 2,
        "learning_rate": 1.0e-2,
        "eval_interval": 4,
    },
    "evaluate": {"max_new_tokens": 12, "passage_tokens": 40},
    "runtime": {"device": "cpu", "threads": 1, "checkpoint_interval": 5},
}


class Project:
    """A repository with this code and tiny params. is_warm: `run` has stages in forks (tests/warm.py)."""

    is_warm = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source, target = ROOT / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, target)
        self.write_params((ROOT / "params.yaml").read_text(), TINY)
        for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "start"]):
            self.run("git", *command)
        # an untracked text, which copies for experiments do not contain
        (folder / "mine.txt").write_text(our_text(400))
        (folder / ".git/info/exclude").write_text("/mine.txt\n")

    def write_params(self, text, changes):
        yaml = YAML()
        content = yaml.load(text)
        for section, values in changes.items():
            content[section].update(values)
        with (self.folder / "params.yaml").open("w") as file:
            yaml.dump(content, file)

    def change(self, **changes):
        self.write_params((self.folder / "params.yaml").read_text(), changes)

    @property
    def environment(self):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "GIT_"))}
        author = {
            f"GIT_{who}_{what}": "me@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        }
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**kept, **author, "PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true", "DVC_NO_ANALYTICS": "1"}

    def warm(self, command):
        """The command, and the environment in which its stages are forks of a warm process (tests/warm.py)."""
        environment, python = self.environment, self.is_warm and warm_python()
        if not python:
            return list(command), environment
        environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
        return [str(python) if word == sys.executable else word for word in command], environment

    def run(self, *command, code=0):
        """Runs a command to its end; returns what it says."""
        words, environment = self.warm(command)
        result = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True)
        output = result.stdout + result.stderr
        assert result.returncode == code, output
        assert "Traceback" not in output
        return output

    def read(self, path):
        return json.loads((self.folder / path).read_text())

    def model_versions(self):
        import mlflow

        return mlflow.MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}").search_model_versions("name = 'gpt2'")

    def runs(self):
        import mlflow

        client = mlflow.MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("gpt2")
        assert experiment.artifact_location == (self.folder / "mlartifacts").as_uri()
        return client.search_runs([experiment.experiment_id])
