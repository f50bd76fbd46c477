import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace

import pytest

from gpt2.config import PRESETS
from gpt2.errors import FileError, UserError
from gpt2.memory import GIB
from stages import preflight
from stages.params import load_params
from tests.conftest import ROOT

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def params(monkeypatch):
    monkeypatch.setattr(preflight, "may_have_gpu", lambda: False)
    return load_params(ROOT / "params.yaml")


def of_size(params, model, **train):
    return replace(params, model=model, train=replace(params.train, **train))


def test_a_batch_that_fits_is_not_split(params):
    assert preflight.micro_batch_that_fits(params) == params.train.batch_size


def test_a_batch_that_does_not_fit_is_split_into_micro_batches(params, monkeypatch):
    monkeypatch.setattr(preflight, "memory_bytes", lambda: 8 * GIB)
    large = of_size(params, PRESETS["gpt2"], batch_size=96, sequence_length=1024)
    size = preflight.micro_batch_that_fits(large)
    assert 1 <= size < 96
    assert 96 % size == 0
    # with a GPU it is not known how much fits, and running out of its memory is an error that can be caught
    monkeypatch.setattr(preflight, "may_have_gpu", lambda: True)
    assert preflight.micro_batch_that_fits(large) == 96


def test_a_model_that_does_not_fit_is_refused_with_numbers(params, monkeypatch):
    monkeypatch.setattr(preflight, "memory_bytes", lambda: 8 * GIB)
    with pytest.raises(
        UserError,
        match=r"about 3\d\.\d GiB even with a micro-batch of one sequence.* has 8\.0 GiB of memory: choose a smaller",
    ):
        preflight.micro_batch_that_fits(of_size(params, PRESETS["gpt2-xl"]))
    with pytest.raises(UserError, match="weights alone take"):
        preflight.micro_batch_that_fits(of_size(params, replace(PRESETS["gpt2-xl"], n_layer=10**6)))


def test_a_full_disk_is_reported_before_the_run(params, monkeypatch, tmp_path):
    preflight.check_disk(params, tmp_path / "checkpoints/abc")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, 10**8))
    with pytest.raises(FileError, match=r"need about 1\.\d GiB, and the disk of .* has 0\.1 GiB left: free disk space"):
        preflight.check_disk(params, tmp_path / "checkpoints/abc")


@pytest.mark.parametrize(("key", "value"), [("n_layer", 10**6), ("n_embd", 2**20), ("block_size", 10**10)])
def test_the_check_takes_less_than_two_seconds(tmp_path, key, value):
    text = (ROOT / "params.yaml").read_text()
    lines = [f"  {key}: {value}" if line.startswith(f"  {key}:") else line for line in text.splitlines()]
    (tmp_path / "params.yaml").write_text("\n".join(lines))
    program = (
        "import sys, runpy, time; started = time.monotonic()\n"
        "try: runpy.run_module('stages.train', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, time.monotonic() - started < 2)"
    )
    started_s = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "2 False True\n", result.stderr
    assert result.stderr.startswith("error: the weights alone take")
    assert result.stderr.count("\n") == 1
    assert time.monotonic() - started_s < 10  # of which most is the start of Python, on a busy machine
