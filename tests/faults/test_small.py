"""Faults of a small run inside this process, or forks of it: seconds for hundreds of cases. `make soak` does more."""

from tests.faults.corruption import corruption
from tests.faults.crash_points import calls_of_a_run, crash_points
from tests.faults.non_finite import non_finite


def test_no_crash_or_error_while_saving_loses_anything(tmp_path):
    calls = calls_of_a_run(tmp_path / "count")
    saves = [number for number, call in enumerate(calls) if call == "makedirs"]
    # the third save is the first that has an older checkpoint to delete
    crash_points(tmp_path, saves[2], saves[3] + 6).check(at_least=120)


def test_damaged_checkpoints_are_recognised_and_passed_over(tmp_path):
    corruption(tmp_path, 500).check(at_least=500)


def test_numbers_that_are_not_finite_reach_neither_weights_nor_files(tmp_path):
    non_finite(tmp_path, 60).check(at_least=50)
