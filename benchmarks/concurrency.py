"""Training on a machine that is busy with other work.

    python -m benchmarks.concurrency --busy           tokens/s alone and beside busy processes (ten minutes)
    python -m benchmarks.concurrency --experiments    two experiments in a row and at once (a quarter of an hour)

`--busy` runs the `laptop` step of `benchmarks.train` with each way in which OpenMP's threads can wait for each other,
in turns. A busy process is an endless loop. `--experiments` trains two experiments of the default params, with fewer
steps, in a copy of the repository. Writes reports/benchmarks/concurrency.{json,md}.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.cores import SPINS

REPORT = Path("reports/benchmarks")
ROUNDS = 2
WAITS = {
    "OpenMP's default": {},
    f"GOMP_SPINCOUNT={SPINS} (ours)": {"GOMP_SPINCOUNT": str(SPINS)},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BUSY = (0, 2, 8)
WINDOW_S = 6.0
EXPERIMENTS: dict[str, tuple[int, list[str]]] = {
    "-j 1": (1, []),
    "-j 2": (2, []),
    "-j 2, runtime.threads=1": (2, ["-S", "runtime.threads=1"]),
}
STEPS = 150


def main() -> None:
    """Measures what is asked for, or, as a worker, one way of waiting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", action="store_true", help="training beside busy processes")
    parser.add_argument("--experiments", action="store_true", help="two experiments in a row and at once")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of all in turns (default: %(default)s)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work()))
        return
    path = REPORT / "concurrency.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    if arguments.busy:
        results["busy"] = beside_busy_processes(arguments.rounds)
    if arguments.experiments:
        results["experiments"] = in_a_row_and_at_once(arguments.rounds)
    REPORT.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    write_table(results)


def beside_busy_processes(rounds: int) -> dict[str, Any]:
    """Tokens/s by way of waiting and number of busy processes, one value for each round."""
    rows: dict[str, dict[str, list[float]]] = {}
    machine = ""
    for _ in range(rounds):
        for name, variables in WAITS.items():
            command = [sys.executable, "-m", "benchmarks.concurrency", "--worker"]
            environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
            done = subprocess.run(command, env=environment | variables, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            machine = machine or result["machine"]
            for busy, tokens_per_s in result["tokens_per_s"].items():
                rows.setdefault(name, {}).setdefault(busy, []).append(tokens_per_s)
            print(f"{name}: {result['tokens_per_s']}", flush=True)
    return {"date": time.strftime("%Y-%m-%d"), "machine": machine, "rows": rows}


def work() -> dict[str, Any]:
    """Times the training step beside 0, 2 and 8 busy processes."""
    import torch

    from benchmarks.steps import our_step
    from benchmarks.train import CASES
    from gpt2.config import GPT2_VOCAB_SIZE, GPTConfig
    from gpt2.device import choose_precision, configure_device, device_name

    device = torch.device("cpu")
    configure_device(device)
    sizes, batch_size, length, _ = CASES["laptop"]
    config = GPTConfig(vocab_size=GPT2_VOCAB_SIZE, **sizes)
    torch.manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (2, batch_size, length))
    step = our_step({"compile": True}, config, choose_precision(device, "auto"), device, [(tokens[0], tokens[1])], [])
    for _ in range(3):
        step()
    tokens_per_s = {}
    for busy in BUSY:
        with busy_processes(busy):
            start_s, steps = time.perf_counter(), 0
            while time.perf_counter() < start_s + WINDOW_S:
                step()
                steps += 1
            tokens_per_s[str(busy)] = round(steps * batch_size * length / (time.perf_counter() - start_s))
    machine = f"{device_name(device)}, {os.cpu_count()} cores, torch {torch.__version__}"
    return {"machine": machine, "tokens_per_s": tokens_per_s}


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Endless loops beside the block."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.5 if count else 0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def in_a_row_and_at_once(rounds: int) -> dict[str, Any]:
    """Seconds of two experiments of the default params, from `dvc queue start` until both are done."""
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # DVC's worker may still write
        project = Path(folder) / "project"
        dvc(Path.cwd(), "git", "clone", "--quiet", ".", str(project))
        if (downloads := Path("data/downloads")).is_dir():
            shutil.copytree(downloads, project / "data/downloads")
        dvc(project, "dvc", "repro", "tokenize")
        seed = 0
        for _ in range(rounds):
            for name, (jobs, settings) in EXPERIMENTS.items():
                for seed in (seed + 1, seed + 2):  # noqa: B020 - each experiment has a seed of its own
                    changes = ["-S", f"train.seed={seed}", "-S", f"train.max_steps={STEPS}", *settings]
                    dvc(project, "dvc", "exp", "run", "--queue", *changes)
                rows.setdefault(name, []).append(seconds_of_queue(project, jobs))
                print(f"{name}: {rows[name][-1]:.0f} s", flush=True)
        if "Failed" in dvc(project, "dvc", "queue", "status"):
            raise SystemExit("an experiment failed: see dvc queue logs")
    return {"date": time.strftime("%Y-%m-%d"), "steps": STEPS, "rows": rows}


def seconds_of_queue(project: Path, jobs: int) -> float:
    """Runs the queue until it is empty."""
    start_s = time.perf_counter()
    dvc(project, "dvc", "queue", "start", "-j", str(jobs))
    while any(state in dvc(project, "dvc", "queue", "status") for state in ("Queued", "Running")):
        time.sleep(2)
    return time.perf_counter() - start_s


def dvc(folder: Path, *command: str) -> str:
    """Runs a command. Raises CalledProcessError."""
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def write_table(results: dict[str, Any]) -> None:
    """reports/benchmarks/concurrency.md."""
    lines = ["# Training on a busy machine", "", "Made by `python -m benchmarks.concurrency`."]
    if busy := results.get("busy"):
        rows = {name: [max(row[str(count)]) for count in BUSY] for name, row in busy["rows"].items()}
        alone = rows["OpenMP's default"][0]
        lines += [
            "",
            f"Training step of `laptop`, tokens/s, best of the rounds. {busy['machine']}, {busy['date']}.",
            "",
            "| | alone | beside 2 busy processes | beside 8 |",
            "|---|---:|---:|---:|",
            *(
                f"| {name} | " + " | ".join(f"{value:,.0f} ({value / alone:.0%})" for value in values) + " |"
                for name, values in rows.items()
            ),
        ]
    if experiments := results.get("experiments"):
        medians = {name: statistics.median(seconds) for name, seconds in experiments["rows"].items()}
        lines += [
            "",
            f"Two experiments of {experiments['steps']} steps, whole pipeline, {experiments['date']}.",
            "",
            "| `dvc queue start` | seconds | to `-j 1` |",
            "|---|---:|---:|",
            *(f"| {name} | {seconds:.0f} | {seconds / medians['-j 1']:.2f} |" for name, seconds in medians.items()),
        ]
    (REPORT / "concurrency.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
