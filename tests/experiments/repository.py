"""A git repository with finished runs in it, as DVC leaves them, without training."""

import json
import subprocess

import numpy as np
from ruamel.yaml import YAML

from stages import paths
from stages.segment_losses import SegmentLosses
from tests.conftest import ROOT

LOCK = """\
schema: '2.0'
stages:
  evaluate:
    cmd: exec python -m stages.evaluate
  train:
    cmd: exec python -m stages.train
    deps:
    - path: data/tokens
      hash: md5
      md5: TEXT.dir
    - path: gpt2/model
      hash: md5
      md5: CODE.dir
    params:
      params.yaml:
        model:
          block_size: 128
    outs:
    - path: models
      hash: md5
      md5: e7fc1a
"""
AUTHOR = ["-c", "user.name=me", "-c", "user.email=me@example.org"]


class Repository:
    """Writes runs to the folder, commits them, and makes experiments of them."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.git("init", "-q", "-b", "main")
        self.write("params.yaml", (ROOT / "params.yaml").read_text())
        self.head = self.commit("start")

    def git(self, *arguments):
        command = ["git", *AUTHOR, *arguments]
        return subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True).stdout.strip()

    def write(self, path, content):
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content if isinstance(content, str) else json.dumps(content))

    def commit(self, message):
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def set_params(self, **changes):
        yaml = YAML()
        params = yaml.load((ROOT / "params.yaml").read_text())
        for name, value in changes.items():
            section, _, key = name.partition("__")
            params[section][key] = value
        with (self.folder / "params.yaml").open("w") as file:
            yaml.dump(params, file)

    def experiment(self, name, losses=None, *, text="text one", code="a0", train=None, **params):
        """A commit below refs/exps/, as `dvc exp run` makes it. params: `train__seed=2`. Returns its hash."""
        self.set_params(**params)
        self.write("dvc.lock", LOCK.replace("TEXT", text).replace("CODE", code))
        if losses is not None:
            self.evaluate(losses, text=text)
        self.write("reports/train/metrics.json", train or {"tokens_per_s": 4000, "peak_memory_bytes": 10**9})
        commit = self.commit(name)
        self.git("update-ref", f"refs/exps/{self.head[:2]}/{self.head[2:]}/{name}", commit)
        self.git("reset", "-q", "--hard", self.head)
        return commit

    def evaluate(self, losses, *, text="text one"):
        """Writes what the evaluate stage writes. losses: nats per token of each segment of 128 tokens."""
        losses = np.array(losses)
        bits = losses / np.log(2) / 3
        num_bytes = np.full(len(losses), 384.0)
        content = SegmentLosses(text, 128 * len(losses), 128, losses, bits, num_bytes)
        self.write(paths.SEGMENT_LOSSES, content.to_json())
        metrics = {"loss": losses.mean(), "bits_per_byte": bits.mean(), "tokens": 128 * len(losses)}
        self.write("reports/evaluate/metrics.json", metrics)
