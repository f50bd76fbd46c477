"""The program `python` that a worker puts on the path: a stage runs in a fork as it would in a process of its own."""

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.sweeping.preload import MODULES, write_client
from tests.conftest import ROOT

SERVER = """
import sys
from experiments.sweeping import preload
preload.MODULES = ("json",)
preload.main()
"""


@pytest.fixture
def client(tmp_path_factory):
    """The program, and the process that forks for it."""
    folder = Path(tmp_path_factory.mktemp("s"))
    client = write_client(folder / "bin", folder / "socket") / "python"
    command = [sys.executable, "-c", SERVER, str(folder / "socket"), str(client)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "ready\n"
    yield client
    server.terminate()
    assert server.wait(timeout=30) == 0
    assert not (folder / "socket").exists()


def run(client, *arguments, **options):
    return subprocess.run([client, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, stages start without it")
def test_a_fork_has_the_arguments_streams_folder_environment_and_exit_code(client, tmp_path):
    done = run(client, "-m", "stages.sync", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m stages.sync")
    done = run(client, "-m", "stages.sync", "--fast")
    assert done.returncode == 2
    assert "unrecognized arguments: --fast" in done.stderr
    empty = subprocess.run([client, "-m", "stages.sync"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (empty.returncode, empty.stderr) == (0, "MLflow has everything\n")
    done = run(client, "-m", "stages.fetch", env={"PATH": "/bin", "DVC_STAGE": "fetch"}, input="")
    assert done.returncode in (0, 2, 74, 75, 143)  # it ran, wherever this checkout stands


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, stages start without it")
def test_a_signal_reaches_the_fork(client, tmp_path):
    (tmp_path / "mlflow-outbox/x.train").mkdir(parents=True)
    (tmp_path / "mlflow-outbox/x.train/record.json").write_text("{}")
    # it reads its standard input, which stays open
    stage = subprocess.Popen([client, "-m", "stages.sync", "--follow", "x.train"], cwd=tmp_path, stdin=subprocess.PIPE)
    time.sleep(1)
    stage.send_signal(signal.SIGTERM)
    assert stage.wait(timeout=30) == 128 + signal.SIGTERM


def test_without_its_process_the_real_python_runs(tmp_path):
    client = write_client(tmp_path / "bin", tmp_path / "socket") / "python"
    done = run(client, "-c", "import sys; print(sys.executable)")
    assert done.stdout.strip() == sys.executable
    assert run(client, "-m", "stages.sync", "--help").returncode == 0


def test_what_is_imported_beforehand_is_there():
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    assert not missing
