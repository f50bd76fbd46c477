import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt2 import errors
from tests.conftest import ROOT


def run_stage(body):
    program = f"from stages.process import *\nfrom gpt2.errors import *\ndef main():\n    {body}\nrun_stage(main)"
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        ("pass", 0, ""),
        ("raise UserError('wrong value')", 2, "error: wrong value\n"),
        ("raise DivergedError('nan')", 3, "error: nan\n"),
        ("raise FileError('no disk')", 74, "error: no disk\n"),
        ("open('/nowhere/file', 'w')", 74, "error: [Errno 2] No such file or directory: '/nowhere/file'; check that"),
        ("raise BusyError('held')", 75, "error: held\n"),
    ],
)
def test_exit_codes_and_their_line(body, code, told):
    result = run_stage(body)
    assert result.returncode == code
    assert result.stderr.startswith(told)
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == bool(told)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_is_an_exit_code(number, code):
    result = run_stage(f"import os; os.kill(os.getpid(), {int(number)})")
    assert result.returncode == code
    assert result.stderr == f"error: interrupted by {number.name}; run the same command again\n"


def test_a_stop_flag_lets_the_work_go_on():
    result = run_stage("import os; stop = StopFlag(); os.kill(os.getpid(), 15); print(bool(stop), stop.signal_number)")
    assert (result.stdout, result.returncode) == ("True 15\n", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_stage_does_not_outlive_its_parent(tmp_path):
    child = (
        "import os, time, pathlib\nfrom stages.process import *\ndef main():\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'pid').write_text(str(os.getpid())); time.sleep(60)\nrun_stage(main)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child is still alive")


def test_interruption_knows_its_exit_code():
    assert errors.Interrupted("x", signal.SIGTERM).exit_code == 143
