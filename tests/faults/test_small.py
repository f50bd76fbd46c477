"""Fault injection into a small run in this process or forks of it: hundreds of cases in seconds."""

from tests.faults.corruption import corruption
from tests.faults.crash_points import calls_of_a_run, crash_points
from tests.faults.non_finite import non_finite


def test_no_crash_or_error_during_a_save_loses_data(tmp_path):
    calls = calls_of_a_run(tmp_path / "count")
    saves = [number for number, call in enumerate(calls) if call == "makedirs"]
    # the third save is the first that has an older checkpoint to delete
    crash_points(tmp_path, saves[2], saves[3] + 6).check(at_least=120)


def test_damaged_checkpoints_are_detected_and_skipped(tmp_path):
    corruption(tmp_path, 500).check(at_least=500)


def test_non_finite_values_reach_neither_weights_nor_checkpoints(tmp_path):
    non_finite(tmp_path, 60).check(at_least=50)
