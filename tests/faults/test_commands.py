"""Faults of the real command line, a few of each kind; `make soak` has them all, and many more kills."""

import pytest

from tests.faults.commands import PHASES, Trained, kills, orphans, signals
from tests.faults.tracking import tracking_faults


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("faults") / "trained")


def test_a_signal_in_any_phase_loses_nothing(tmp_path, trained):
    signals(tmp_path, trained, [(phase, number % 4 > 1) for number, phase in enumerate(PHASES)]).check(at_least=8)


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, trained):
    kills(tmp_path, trained, 10).check(at_least=10)


def test_a_stage_whose_dvc_is_gone_ends_and_nobody_writes_beside_it(tmp_path, trained):
    orphans(tmp_path, trained, 2).check(at_least=2)


def test_tracking_that_fails_changes_nothing(tmp_path, trained):
    tracking_faults(tmp_path, trained, ["refused", "black hole", "database locked"]).check(at_least=3)
