from dataclasses import replace

import pytest
import torch

from gpt2.errors import DifferentError, UserError
from stages import workers
from stages.params import load_params
from tests.conftest import ROOT


@pytest.fixture
def params():
    return load_params(ROOT / "params.yaml")


@pytest.fixture
def with_devices(monkeypatch):
    def set_number(number):
        monkeypatch.setattr(workers, "may_use_gpu", lambda _: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)

    return set_number


def of(params, **runtime):
    return workers.count(replace(params, runtime=replace(params.runtime, **runtime)))


def test_auto_is_one_process_for_each_cuda_device(params, with_devices):
    with_devices(4)
    assert of(params) == 4
    with_devices(0)
    assert of(params) == 1


def test_a_cpu_trains_in_one_process_unless_told_otherwise(params):
    assert of(params, device="cpu") == 1
    assert of(params, device="cpu", processes=4) == 4


@pytest.mark.parametrize(
    ("devices", "runtime", "message"),
    [
        (2, {"processes": 4}, "runtime.processes is 4, and the CUDA devices here are 2"),
        (0, {"processes": 2}, "there is no CUDA device; set runtime.device: cpu"),
        (1, {"strategy": "fsdp"}, "runtime.strategy is 'fsdp', which divides the model among processes, and one"),
        (3, {}, "8 sequences, which 3 processes cannot divide; possible: 1, 2, 4, 8"),
    ],
)
def test_what_the_machine_or_the_batch_cannot_do_is_one_line(params, with_devices, devices, runtime, message):
    with_devices(devices)
    with pytest.raises(UserError, match=message):
        of(params, **runtime)


class FakeWorld:
    """Two processes; theirs: what the other one has."""

    name = "rank 0 on a"

    def __init__(self, **theirs):
        self.theirs = theirs

    def gather(self, pair):
        name, mine = pair
        return [(name, mine), ("rank 1 on b", {**mine, **self.theirs})]


def test_processes_that_would_train_something_else_are_refused_by_name():
    identity = {"train": {"seed": 1}, "code": "abc"}
    workers.require_same(FakeWorld(), identity)
    with pytest.raises(DifferentError) as raised:
        workers.require_same(FakeWorld(**{"torch": "2.12", "train.seed": "2"}), identity)
    assert str(raised.value) == (
        f"rank 1 on b differs from rank 0 on a in torch (2.12 instead of {torch.__version__}), train.seed (2 instead "
        "of 1); use the same commit, params.yaml, tokens and packages on all nodes"
    )


def test_an_ending_that_cannot_be_read_is_none(tmp_path):
    path = tmp_path / "ending.json"
    assert workers.read_ending(path) is None
    path.write_text('{"exit_code": 143, "said": true}')
    assert workers.read_ending(path) == {"exit_code": 143, "said": True}
    path.write_text("{")
    assert workers.read_ending(path) is None
