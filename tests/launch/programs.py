"""Stand-ins for the programs that the files in launch/ start: each records how it was called."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

# Each stand-in appends its name and arguments to $CALLS. What it does then:
PROGRAMS = {
    # runs the command on one node, without srun's own options
    "srun": 'while [[ "$1" == --* ]]; do shift; done; "$@"; exit',
    "scontrol": """case "$1 $2" in
        "show hostnames") printf '%s\\n' node-9 node-10 ;;
        "show job") echo "JobId=7 PreemptTime=${PREEMPT_TIME:-None}" ;;
        esac""",
    # the signal reaches torchrun; srun does not get it
    "scancel": 'kill -TERM "$(cat torchrun.pid)"',
    "dvc": """case "$*" in
        "remote default") exit "${NO_REMOTE:-0}" ;;
        "repro tokenize" | "repro --pull tokenize") exit "${TOKENIZE_CODE:-0}" ;;
        esac""",
    "torchrun": """if [ -n "${TORCHRUN_WAITS:-}" ]; then
        trap 'echo "torchrun gets TERM" >>"$CALLS"; sleep 0.3; exit 1' TERM
        echo $$ >torchrun.tmp; mv torchrun.tmp torchrun.pid
        while :; do sleep 0.05; done
        fi
        exit "${TORCHRUN_CODE:-0}" """,
    "tar": "",
    "make": "",
    "git": "mkdir .git",
    "uv": 'if [ "$1 $2" = "python find" ]; then echo /uv/python3.12; fi',
    "python3": 'if [ "$1" = -c ]; then exit "${OLD_PYTHON:-0}"; fi',
}
IN_THE_ENVIRONMENT = ("dvc", "torchrun")


class Checkout:
    """A folder with dvc.yaml and an environment, where the stand-ins run instead of the real programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_file = folder / "calls"
        (folder / ".venv/bin").mkdir(parents=True)
        (folder / "bin").mkdir()
        (folder / "dvc.yaml").touch()
        (folder / ".venv/bin/activate").write_text(f"PATH={shlex.quote(str(folder / '.venv/bin'))}:$PATH\n")
        for name, body in {**PROGRAMS, ".venv/bin/python": ""}.items():
            place = ".venv/bin" if name in IN_THE_ENVIRONMENT else "bin"
            path = folder / (name if "/" in name else f"{place}/{name}")
            path.write_text(f'#!/usr/bin/env bash\necho "{path.name} $*" >>"$CALLS"\n{body}\n')
            path.chmod(0o755)

    def environment(self, **changes: str) -> dict[str, str]:
        ours = ("SLURM", "SKYPILOT", "DVC", "TORCH", "VENV", "PORT", "PROCESSES", "MAX_RESTARTS", "STOP_SECONDS")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        path = f"{self.folder / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
        return {**kept, "PATH": path, "CALLS": str(self.calls_file), **changes}

    def start(self, *command: str, **changes: str) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment(**changes), stdout=pipe, stderr=pipe, text=True
        )

    def run(self, *command: str, **changes: str) -> tuple[int, str]:
        """Exit code and output."""
        process = self.start(*command, **changes)
        stdout, stderr = process.communicate(timeout=60)
        return process.returncode, stdout + stderr

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def wait_for(self, path: str) -> int:
        """The process id in a file, as soon as it is there."""
        deadline = time.monotonic() + 30
        while not (self.folder / path).exists():
            assert time.monotonic() < deadline, self.calls()
            time.sleep(0.02)
        return int((self.folder / path).read_text())

    def interrupt(self, process: "subprocess.Popen[str]", *numbers: signal.Signals) -> int:
        """Sends signals to a process alone, once torchrun runs, and returns its exit code."""
        self.wait_for("torchrun.pid")
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.1)
        process.communicate(timeout=60)
        return process.returncode
