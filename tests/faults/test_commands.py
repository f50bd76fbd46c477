"""Fault injection into the real command line, a few cases of each kind; `make soak` runs all of them."""

import re
import resource
import signal
import subprocess
from functools import partial

import pytest

from tests.faults.commands import PHASES, PLAIN, Trained, finish, forget, kills, results, signals
from tests.faults.orphans import orphaned_processes
from tests.faults.tracking import tracking_faults

FEW_PHASES = [("step", True), ("saving", False)]
OTHER_PHASES = [(phase, number % 4 > 1) for number, phase in enumerate(PHASES) if phase not in dict(FEW_PHASES)]


def slow(*values):
    """The same test with more cases, for `make test-slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("faults") / "trained")


@pytest.mark.parametrize("cases", [FEW_PHASES, slow(OTHER_PHASES)])
def test_a_signal_in_any_phase_loses_nothing(tmp_path, trained, cases):
    signals(tmp_path, trained, cases).check(at_least=len(cases))


@pytest.mark.parametrize("cases", [2, slow(10)])
def test_a_killed_run_resumes_to_the_same_result(tmp_path, trained, cases):
    kills(tmp_path, trained, cases).check(at_least=cases)


def test_an_orphaned_stage_ends_and_no_second_run_writes(tmp_path, trained):
    orphaned_processes(tmp_path, trained, 2).check(at_least=2)


def full_disk(size):
    """Limits the size of files, in bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("size", "warnings", "advice"),
    [
        (30_000, 2, "free disk space, and run again to continue"),  # less than a checkpoint
        (3_000_000, 0, "cannot write models/last.safetensors"),  # less than the model
    ],
)
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, trained, size, warnings, advice):
    project = trained.copy(tmp_path / "project")
    forget(project)
    command = subprocess.run(
        PLAIN,
        cwd=project.folder,
        env=project.environment,
        capture_output=True,
        text=True,
        preexec_fn=partial(full_disk, size),
    )
    assert command.returncode == 74
    assert command.stderr.count("WARNING: cannot write the checkpoint") == warnings
    (line,) = [line for line in command.stderr.splitlines() if line.startswith("error:")]
    assert "File too large" in line
    assert advice in line
    assert "free disk space, and run again" in line
    assert "Traceback" not in command.stderr
    assert finish(project, PLAIN) is None
    assert results(project) == trained.expected


def test_an_invalid_checkpoint_folder_is_reported_before_the_run(tmp_path, trained):
    project = trained.copy(tmp_path / "project")
    project.change(runtime={"checkpoint_folder": "mine.txt/inside"})
    output = project.run(*PLAIN, code=74)
    assert output.count("\n") == 1
    assert re.match(r"error: \[Errno 20\] Not a directory: .*mine\.txt/inside.*; check that the folder can be", output)


def test_a_divergence_names_its_step_and_the_last_good_checkpoint(tmp_path, trained):
    project = trained.copy(tmp_path / "project")
    project.change(train={"learning_rate": 1.0e20, "optimizer": "adamw"}, runtime={"checkpoint_interval": 1})
    errors = [project.run(*PLAIN, code=3).splitlines()[-1] for _ in range(3)]
    assert re.match(
        r"error: training diverged at step \d+: loss .*The last good checkpoint is .*step-00000\d$", errors[0]
    )
    assert errors[1] == errors[0]
    assert "This happened 2 times at the same step" in errors[2]


@pytest.mark.parametrize("faults", [["black hole"], slow(["refused", "black hole", "database locked"])])
def test_tracking_that_fails_changes_nothing(tmp_path, trained, faults):
    tracking_faults(tmp_path, trained, faults).check(at_least=len(faults))
