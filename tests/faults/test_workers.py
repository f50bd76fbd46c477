"""Faults of one of several processes: the others notice, one of them speaks, and nothing is lost."""

import csv
import re
import signal

import pytest

from tests.faults.commands import PLAIN, finish, results
from tests.faults.workers import fault_of_one_process, killed_workers, stopped_workers, training_in

LOSS = "gpt2.training.mixed_precision:MixedPrecisionModel.loss:{call}"


def slow(*values):
    """The same test with more cases, for `make test-slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return training_in(tmp_path_factory.mktemp("workers") / "trained", "ddp")


@pytest.fixture
def project(tmp_path, trained):
    return trained.copy(tmp_path / "project")


def errors(output):
    return re.findall(r"^error: .*", output, re.MULTILINE)


def warnings(output):
    """Without MLflow's lateness, which tells of a busy machine alone."""
    return re.findall(r"^WARNING: (?!MLflow ).*", output, re.MULTILINE)


def train_losses(project):
    with (project.folder / "reports/train/history.csv").open() as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file)]


def test_a_killed_process_costs_only_time(tmp_path, trained):
    killed_workers(tmp_path, trained, 1).check(at_least=1)


@pytest.mark.slow
def test_a_killed_process_of_a_sharded_run_costs_only_time(tmp_path):
    killed_workers(tmp_path, training_in(tmp_path / "trained", "fsdp"), 2).check(at_least=2)


@pytest.mark.parametrize("cases", [1, slow(9)])
def test_a_signal_stops_all_processes_with_one_checkpoint(tmp_path, trained, cases):
    stopped_workers(tmp_path, trained, cases).check(at_least=cases)


@pytest.mark.slow
def test_a_process_killed_during_a_save_costs_only_time(project, trained):
    number = {"FAULT_SIGNAL": str(int(signal.SIGKILL))}
    call = "gpt2.distributed.checkpoints:ShardedWriter._publish:2"
    code, output = fault_of_one_process(project, "signal", call, **number)
    assert code == 0, output
    assert "resuming from step 3 of 30" in output
    assert results(project) == trained.expected


@pytest.mark.slow
def test_nan_in_one_process_stops_all(project):
    code, output = fault_of_one_process(project, "nan", LOSS.format(call=9))
    assert code == 3, output
    (line,) = errors(output)
    assert "training diverged at step" in line
    assert "The last good checkpoint is" in line
    assert "Traceback" not in output


@pytest.mark.slow
def test_out_of_memory_in_one_process_halves_the_micro_batch_of_all(project):
    project.change(train={"dropout": 0.0})  # its masks depend on the micro-batch
    project.run(*PLAIN)
    expected = train_losses(project)
    code, output = fault_of_one_process(project, "memory", LOSS.format(call=9))
    assert code == 0, output
    assert errors(output) == []
    first, second = warnings(output)
    assert re.match(r"WARNING: rank 1 on \S+: out of memory in step \d+ with a micro-batch of 4: .* of 2 comes", first)
    assert "the micro-batch is 2 instead of 4; the global batch stays 128 tokens" in second
    assert train_losses(project) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_a_process_that_hangs_is_named(project, trained):
    code, output = fault_of_one_process(project, "hang", LOSS.format(call=9), GPT2_COLLECTIVE_TIMEOUT_S="15")
    assert code == 0, output
    (line,) = warnings(output)
    assert re.match(r"WARNING: rank 1 on \S+ does not answer; training goes on from the newest checkpoint", line)
    assert results(project) == trained.expected


@pytest.mark.slow
def test_a_bug_in_one_process_is_told_once(project):
    code, output = fault_of_one_process(project, "error", LOSS.format(call=9))
    assert code == 1, output
    (line,) = errors(output)
    assert re.match(r"error: rank 1 on \S+: ValueError: a bug", line)
    assert output.count("Traceback") == 1


@pytest.mark.slow
def test_a_full_disk_of_one_process_is_one_line_and_loses_nothing(project, trained):
    code, output = fault_of_one_process(project, "disk", "gpt2.optimizers.optimizer:Optimizer.step:1")
    assert code == 74, output
    (line,) = errors(output)
    assert re.match(r"error: .*cannot write the checkpoint .*rank 1 on \S+: .*; free disk space", line)
    assert finish(project, PLAIN) is None
    assert results(project) == trained.expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runtime": {"processes": 3}}, "is 8 sequences, which 3 processes cannot divide; possible: 1, 2, 4, 8"),
        (
            {"runtime": {"processes": 1, "strategy": "fsdp"}},
            "runtime.strategy is 'fsdp', which divides the model",
        ),
        ({"runtime": {"processes": 2, "device": "mps"}}, "runtime.processes is 2, and there is no CUDA device"),
        ({"runtime": {"processes": 0}}, "runtime.processes is 0; expected 'auto' or greater than 0"),
        ({"runtime": {"processes": "many"}}, "runtime.processes is 'many'; expected 'auto' or an integer"),
        ({"runtime": {"strategy": "zero"}}, "runtime.strategy is 'zero'"),
    ],
)
def test_wrong_numbers_of_processes_are_one_line(project, changes, message):
    project.change(**changes)
    output = project.run(*PLAIN, code=2)
    (line,) = errors(output)
    assert message in line
