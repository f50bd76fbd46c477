import subprocess
import sys

from benchmarks import generate
from benchmarks.generation import report

STARTED = [sys.executable, "-m", "benchmarks.generate", "--worker"]


def test_a_contender_that_fails_or_takes_too_long_is_skipped(monkeypatch, capsys):
    def start(command, **options):
        assert command[:4] == STARTED
        if command[4] == "slow":
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nRuntimeError: no bf16\n")

    monkeypatch.setattr(subprocess, "run", start)
    assert generate.run("broken", "here") is None
    assert generate.run("slow", "here") is None
    assert capsys.readouterr().out.splitlines() == [
        "broken: skipped (RuntimeError: no bf16, exit code 1)",
        f"slow: skipped ({generate.TIMEOUT_S} s were not enough)",
    ]


def test_a_contender_that_was_skipped_does_not_run_again(monkeypatch):
    runs, written = [], []

    def run(name, place):
        runs.append(name)
        return None if name == "broken" else {"1 x 100": float(len(runs))}

    monkeypatch.setattr(generate, "run", run)
    monkeypatch.setattr(generate.machine, "describe", lambda threads: ("A CPU", {}))
    monkeypatch.setattr(report, "load", dict)
    monkeypatch.setattr(report, "write", written.append)
    generate.compare(["broken", "ours, int8"], "here", 2)
    assert runs == ["broken", "ours, int8", "ours, int8"]
    assert written[-1] == {"A CPU": {"results": {"ours, int8": {"1 x 100": 3.0}}}}
