import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt2 import errors
from tests.conftest import ROOT


def run_stage(body, folder, environment={}, **options):  # noqa: B006 - read only
    program = f"from stages.process import *\nfrom gpt2.errors import *\ndef main(stop):\n    {body}\nrun_stage(main)"
    # also where the tests themselves run under nohup
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        **options,
    )


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("pass", 0, ""),
        ("raise UserError('wrong value')", 2, "error: wrong value\n"),
        ("raise DivergedError('nan', 7)", 3, "error: nan\n"),
        ("raise FileError('no disk')", 74, "error: no disk\n"),
        ("open('/nowhere/file', 'w')", 74, "error: [Errno 2] No such file or directory: '/nowhere/file'; check that"),
        ("raise BusyError('held')", 75, "error: held\n"),
    ],
)
def test_each_error_has_an_exit_code_and_one_line(tmp_path, body, code, message):
    result = run_stage(body, tmp_path)
    assert result.returncode == code
    assert result.stderr.startswith(message)
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == bool(message)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_only_sets_a_flag(tmp_path, number, code):
    body = f"os.kill(os.getpid(), {int(number)}); print('still here', bool(stop)); stop.check(); print('not here')"
    result = run_stage(body, tmp_path)
    assert result.returncode == code
    assert result.stdout == "still here True\n"
    assert result.stderr == f"error: interrupted by {number.name}; run the same command again\n"


def test_progress_callbacks_check_the_flag(tmp_path):
    body = "report = stop.wrap(print); report(1); os.kill(os.getpid(), 15); report(2)"
    result = run_stage(body, tmp_path)
    assert (result.stdout, result.returncode) == ("1\n", 143)


def test_the_second_signal_changes_nothing_and_the_third_ends_the_process(tmp_path):
    twice = "[os.kill(os.getpid(), 2) for _ in range(2)]; print('saved', flush=True); stop.check()"
    assert (result := run_stage(twice, tmp_path)).returncode == 130
    assert result.stdout == "saved\n"
    thrice = "[os.kill(os.getpid(), 2) for _ in range(3)]; print('saved', flush=True)"
    assert (result := run_stage(thrice, tmp_path)).returncode == 130
    assert result.stdout == ""


def test_a_signal_that_nohup_ignores_stays_ignored(tmp_path):
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    body = "os.kill(os.getpid(), 1); print(bool(stop))"
    assert run_stage(body, tmp_path, preexec_fn=ignore).stdout == "False\n"


def test_a_closed_terminal_does_not_end_the_work(tmp_path):
    body = "[echo('x' * 100) for _ in range(9999)]"
    program = f"from stages.process import *\ndef main(stop):\n    {body}\nrun_stage(main)"
    (tmp_path / "program.py").write_text(program)
    command = f"{sys.executable} program.py 2>&1 >/dev/null | head -1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "x" * 100 + "\n")


def test_out_of_memory_is_one_line(tmp_path):
    for error in ("MemoryError()", "RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried')"):
        result = run_stage(f"raise {error}", tmp_path)
        assert result.returncode == 74
        assert result.stderr.startswith("error: out of memory")
        assert result.stderr.count("\n") == 1


def test_secrets_are_redacted():
    from stages.process import redact_secrets

    for secret in ("https://me:s3cret@example.org/x.txt", "http://host/a?token=s3cret&x=1", "with hf_s3cretS3CRET"):
        assert "cret" not in redact_secrets(f"cannot download {secret}: no")
    assert redact_secrets("https://example.org/plain.txt: 404?") == "https://example.org/plain.txt: 404?"


def test_two_stages_do_not_run_in_one_folder(tmp_path):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "second.py").write_text("from stages.process import *; run_stage(print)")
    first = "import subprocess; print(subprocess.run([sys.executable, 'second.py'], stderr=subprocess.PIPE, text=True))"
    result = run_stage(first, tmp_path)
    assert f"error: {tmp_path} is in use by process " in result.stdout
    assert "returncode=75" in result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_stage_does_not_outlive_its_parent(tmp_path):
    child = (
        "import os, time, pathlib\nfrom stages.process import *\ndef main(stop):\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'pid').write_text(str(os.getpid()))\n"
        "    for _ in range(600):\n        time.sleep(0.1)\n        stop.check()\nrun_stage(main)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DVC_STAGE": "train"},
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


def test_a_stage_that_starts_after_its_dvc_ended_stops(tmp_path):
    (tmp_path / "stage.py").write_text(
        "from stages.process import *\ndef main(stop):\n    stop.check()\n    open('ran', 'w')\nrun_stage(main)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_STAGE": "train"}
    stderr = tmp_path / "stderr"
    stderr.touch()
    started_alone = (
        f"(while kill -0 $$ 2> /dev/null; do sleep 0.01; done; exec {sys.executable} stage.py 2> stderr) & exit"
    )
    subprocess.run(["sh", "-c", started_alone], cwd=tmp_path, env=environment, start_new_session=True, check=True)
    deadline = time.monotonic() + 20
    while not stderr.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert stderr.read_text() == "error: interrupted by SIGTERM; run the same command again\n"
    assert not (tmp_path / "ran").exists()


def test_an_interruption_has_the_exit_code_of_its_signal():
    assert errors.Interrupted("x", signal.SIGTERM).exit_code == 143
