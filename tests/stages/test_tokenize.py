"""The tokenize stage as a process."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stages import tokenize
from tests.conftest import ROOT, our_text, write_documents


@pytest.fixture
def folder(tmp_path):
    """A folder with the inputs of the stage: a text of four blocks."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("threads: null", "threads: 2"))
    (tmp_path / "data").mkdir()
    write_documents(tmp_path / "data", [our_text(5000, seed) for seed in range(4)] * 16)
    return tmp_path


def start(folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_ROOT": str(folder)}
    command = [sys.executable, "-m", "stages.tokenize"]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def children_of(process, count=2):
    """Its worker processes, as soon as there are so many."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        children = psutil.Process(process.pid).children()
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        if len(workers) >= count:
            return children
        time.sleep(0.01)
    raise AssertionError("there were no workers")


def test_it_tells_the_sizes_of_the_splits_and_duplicates(folder):
    process = start(folder)
    output = process.stderr.read()
    assert process.wait() == 0, output
    found = re.search(
        r"data/tokens: ([\d,]+) training and ([\d,]+) validation tokens; (\d) validation documents", output
    )
    assert found, output
    assert found[3] == "6"
    assert sorted(path.name for path in (folder / "data").iterdir()) == ["corpus.txt", "documents.bin", "tokens"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_one_line_and_no_process_left(folder, number, code):
    process = start(folder)
    children = children_of(process)
    if number == signal.SIGINT:  # a terminal sends it to all
        for child in children:
            child.send_signal(number)
    process.send_signal(number)
    output = process.stderr.read()
    assert process.wait() == code, output
    assert output == f"error: interrupted by {number.name}; run the same command again\n"
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert not (folder / "data/tokens").exists()


def test_a_killed_worker_is_one_line(folder):
    process = start(folder)
    children = children_of(process)
    for child in children:
        if "spawn_main" in " ".join(child.cmdline()):
            child.kill()
            break
    output = process.stderr.read()
    assert process.wait() == 74, output
    assert output.startswith("error: a process that encodes text was killed")
    assert output.count("\n") == 1
    assert psutil.wait_procs(children, timeout=5)[1] == []


def test_large_data_comes_with_advice_about_links(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    subprocess.run(["dvc", "init", "--no-scm", "-q"], check=True)
    tokenize.tell_about_links()
    advice = capsys.readouterr().err
    assert tokenize.LINK in advice
    assert advice.count("\n") == 1
    subprocess.run(tokenize.LINK.split(), check=True)
    tokenize.tell_about_links()
    monkeypatch.setenv("PATH", "")
    tokenize.tell_about_links()
    assert capsys.readouterr().err == ""
