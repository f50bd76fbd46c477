import os
from dataclasses import replace

import pytest

from gpt2.errors import BusyError, Interrupted
from gpt2.files import file_lock
from stages import cores, preflight
from stages.cores import cores_lock, reserve_cores
from stages.params import load_params
from tests.conftest import ROOT, NeverStops


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / ".dvc").mkdir()
    monkeypatch.setattr(cores, "POLL_S", 0.001)
    for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(variable, "")  # so that it is restored
        monkeypatch.delenv(variable)
    return replace(load_params(ROOT / "params.yaml").runtime, device="cpu", threads=None)


class StopsWaiting(NeverStops):
    """Calls a function at the third check."""

    def __init__(self, action):
        self.checks, self.action = 0, action

    def check(self):
        self.checks += 1
        if self.checks == 3:
            self.action()


def test_a_stage_waits_until_another_one_gives_the_cores_back(runtime, capsys):
    other = file_lock(cores_lock())
    other.__enter__()
    stop = StopsWaiting(lambda: other.__exit__(None, None, None))
    with reserve_cores(runtime, stop):
        assert stop.checks == 3
    message = capsys.readouterr().err
    assert message.startswith(f"waiting for the cores, in use by process {os.getpid()} on ")
    assert message.count("\n") == 1


def test_experiments_in_copies_of_the_repository_wait_for_each_other(runtime, tmp_path, monkeypatch):
    ours = cores_lock()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / ".dvc/tmp/exps/abc"))
    assert cores_lock() == ours


def test_a_signal_ends_the_wait(runtime):
    def interrupt():
        raise Interrupted("interrupted", 15)

    with file_lock(cores_lock()), pytest.raises(Interrupted), reserve_cores(runtime, StopsWaiting(interrupt)):
        raise AssertionError("it did not wait")


def refuse_to_wait():
    raise AssertionError("it waits")


@pytest.mark.parametrize("changes", [{"threads": 1}, {"device": "cuda"}, {"device": "mps"}, {"device": "auto"}])
def test_a_stage_that_does_not_take_all_cores_does_not_wait(runtime, changes, monkeypatch):
    monkeypatch.setattr(preflight, "may_have_gpu", lambda: True)
    entered = False
    with file_lock(cores_lock()), reserve_cores(replace(runtime, **changes), StopsWaiting(refuse_to_wait)):
        entered = True
    assert entered


def test_outside_of_a_dvc_repository_nothing_is_locked(runtime, tmp_path, never_stops):
    (tmp_path / ".dvc").rmdir()
    with reserve_cores(runtime, never_stops):
        assert not list(tmp_path.iterdir())


def test_a_busy_error_of_the_block_is_not_taken_for_a_wait(runtime):
    with pytest.raises(BusyError, match="another lock"), reserve_cores(runtime, StopsWaiting(refuse_to_wait)):
        raise BusyError("another lock")
    with file_lock(cores_lock()):  # it is free again
        pass


@pytest.mark.parametrize("chosen", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_how_threads_wait_is_the_users_choice(runtime, chosen, monkeypatch, never_stops):
    with reserve_cores(runtime, never_stops):
        assert os.environ["GOMP_SPINCOUNT"] == str(cores.SPINS)
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv(chosen, "7")
    with reserve_cores(runtime, never_stops):
        assert os.environ.get("GOMP_SPINCOUNT") == ("7" if chosen == "GOMP_SPINCOUNT" else None)
