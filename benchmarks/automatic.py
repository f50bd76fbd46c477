"""`preset auto` beside the preset laptop in the same time: how long its `dvc repro` takes, and both losses.

    python -m benchmarks.automatic                        three texts, three minutes each: half an hour on two cores
    python -m benchmarks.automatic --minutes 20 --only note
    taskset -c 0 python -m benchmarks.automatic --only note         on one core, while another text has the other

Each run is a `dvc repro` in a clone of this repository. The preset laptop trains as many steps as fit the seconds that
the other run trained, and holds out as much of the text; if its own number of steps takes less time, it trains those,
too. Runs that are in the report already are not repeated. The last commit is measured, with Tiny Shakespeare from the
last run of the pipeline. Writes reports/benchmarks/automatic.{json,md}.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.learning import REPORT
from experiments.automatic.writing import Changes, with_changes
from stages.cores import available
from stages.params import load_params

ROOT = Path(__file__).parent.parent
SOURCE = Path("data/own.txt")
RUNS = REPORT / "automatic.json"
WARM_UP, EVALUATIONS, STEP_TOKENS = 20 / 900, 9, 1024
"""Of presets/laptop.yaml: share of the steps; evaluations; tokens in a step."""
CALIBRATION_STEPS = 2 * EVALUATIONS, 10 * EVALUATIONS


def shakespeare(num_bytes: int | None = None) -> str:
    """The start of Tiny Shakespeare, of the last run of the pipeline."""
    path = ROOT / "data/downloads/tinyshakespeare.txt"
    if not path.is_file():
        sys.exit(f"{path} is not there: dvc repro fetch")
    return path.read_bytes()[:num_bytes].decode()


def python_code(num_bytes: int = 20_000_000) -> str:
    """Files of Python's standard library, in a random order that is always the same."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)
    random.Random(1).shuffle(files)  # noqa: S311 - an order
    text = bytearray()
    for path in files:
        text += path.read_bytes() + b"\n"
        if len(text) >= num_bytes:
            break
    return text[:num_bytes].decode(errors="ignore")


TEXTS: dict[str, Callable[[], str]] = {
    "note, 30 kB": lambda: shakespeare(30_000),
    "novel, 1 MB": shakespeare,
    "code, 20 MB": python_code,
}


class Clone:
    """A clone of this repository with a text of one's own."""

    def __init__(self, folder: Path, text: str) -> None:
        """folder: to be made."""
        self.folder = folder
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        (folder / SOURCE).write_text(text, encoding="utf-8")

    def run(self, *command: str) -> float:
        """Runs a command there; returns its seconds. What it prints is shown if it fails."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder)}
        start_s = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return time.perf_counter() - start_s

    def write_params(self, content: str) -> None:
        """Writes params.yaml."""
        (self.folder / "params.yaml").write_text(content, encoding="utf-8")

    def training(self) -> dict[str, Any]:
        """The metrics of the training."""
        found: dict[str, Any] = json.loads((self.folder / "reports/train/metrics.json").read_text())
        return found


def main() -> None:
    """Trains what the report lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="default: %(default)g")
    parser.add_argument("--only", default="", help="texts with this in their name")
    arguments = parser.parse_args()
    from gpt2.device import choose_device, device_name

    cores = available()
    machine = f"{device_name(choose_device('auto'))}, {cores} {'core' if cores == 1 else 'cores'}"
    for name, read in TEXTS.items():
        key = {"text": name, "minutes": arguments.minutes, "machine": machine}
        if arguments.only not in name or any(key.items() <= known.items() for known in reported()):
            continue
        with tempfile.TemporaryDirectory(prefix="automatic-") as folder:
            run = {**key, **side_by_side(Path(folder), read(), arguments.minutes)}
        print(json.dumps(run), flush=True)
        REPORT.mkdir(parents=True, exist_ok=True)
        RUNS.write_text(json.dumps([*reported(), run], indent=1) + "\n")  # others may run on other cores
    (REPORT / "automatic.md").write_text(table(reported()))


def reported() -> list[dict[str, Any]]:
    """The runs in the report."""
    runs: list[dict[str, Any]] = json.loads(RUNS.read_text()) if RUNS.is_file() else []
    return runs


def side_by_side(folder: Path, text: str, minutes: float) -> dict[str, Any]:
    """One run of each on a text."""
    automatic = Clone(folder / "automatic", text)
    choosing_s = automatic.run("gpt2", "preset", "auto", "--minutes", str(minutes), "--source", str(SOURCE))
    repro_s = automatic.run("dvc", "repro")
    params, trained = load_params(automatic.folder / "params.yaml"), automatic.training()
    laptop = Clone(folder / "laptop", text)
    held_out = params.tokenize.validation_fraction

    def train_laptop(steps: int, evaluations: int) -> dict[str, Any]:
        laptop.write_params(laptop_params(steps, evaluations, held_out))
        laptop.run("dvc", "repro", "train")
        return laptop.training()

    few, more = CALIBRATION_STEPS
    few_s, more_s = (train_laptop(steps, EVALUATIONS)["elapsed_s"] for steps in CALIBRATION_STEPS)
    step_s = (more_s - few_s) / (more - few)
    others_s = few_s - few * step_s  # evaluations
    beside = train_laptop(max(2, round((trained["elapsed_s"] - others_s) / step_s)), EVALUATIONS)
    usual_steps = load_params(ROOT / "presets/laptop.yaml").train.max_steps
    is_shorter = usual_steps < beside["steps"]
    return {
        "choosing_s": choosing_s,
        "repro_s": repro_s,
        "expected": expected_loss((automatic.folder / "params.yaml").read_text()),
        "loss": trained["best_val_loss"],
        "laptop": beside["best_val_loss"],
        "laptop_unchanged": train_laptop(usual_steps, EVALUATIONS)["best_val_loss"] if is_shorter else None,
        "training_s": [trained["elapsed_s"], beside["elapsed_s"]],
        "steps": [trained["steps"], beside["steps"]],
    }


def laptop_params(steps: int, evaluations: int, held_out: float) -> str:
    """The preset laptop for the text. held_out: share of it."""
    changes: Changes = {
        ("corpus", "source"): (str(SOURCE), ""),
        ("tokenize", "validation_fraction"): (held_out, ""),
        ("train", "max_steps"): (steps, ""),
        ("train", "warmup_steps"): (max(1, round(WARM_UP * steps)), ""),
        ("train", "eval_interval"): (-(-steps // evaluations), ""),
        ("runtime", "compile"): ("always", ""),
    }
    return with_changes((ROOT / "presets/laptop.yaml").read_text(encoding="utf-8"), changes)


def expected_loss(params: str) -> float:
    """That of the comment in a params.yaml."""
    return float(params.split("Expected validation loss ")[1].split()[0])


def table(runs: list[dict[str, Any]]) -> str:
    """The report in Markdown."""
    lines = [
        "# preset auto",
        "",
        "Made by `python -m benchmarks.automatic`: a whole `dvc repro` of the params that `preset auto` wrote, its "
        "expected and its best validation loss, and that of the preset `laptop` with as many steps as it trains in "
        "about the same seconds: the last column has both trainings'. Where the preset takes less time with its own "
        "number of steps, that loss is there, too.",
        "",
        "| machine | text | minutes | `dvc repro`, minutes | expected loss | loss | loss of laptop | its own steps | "
        "seconds |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in sorted(runs, key=lambda run: (run["machine"], run["minutes"])):
        unchanged = run.get("laptop_unchanged")
        last = "" if unchanged is None else f"{unchanged:.2f}"
        lines.append(
            f"| {run['machine']} | {run['text']} | {run['minutes']:g} | {run['repro_s'] / 60:.1f} | "
            f"{run['expected']:.2f} | {run['loss']:.2f} | {run['laptop']:.2f} | {last} | "
            f"{'; '.join(f'{seconds:.0f}' for seconds in run['training_s'])} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
