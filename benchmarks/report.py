"""The report of runs: its size, the time to make it, and the time until a browser can use it.

The runs are invented, with curves, samples and passages of the size of real ones, in a git repository as DVC leaves
them. The browser is a Chromium on the PATH, or its path in CHROMIUM.

    python -m benchmarks.report --runs 20
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path("reports/benchmarks/report.json")
WORDS = (
    "the",
    "king",
    "of",
    "night",
    "and",
    "day",
    ",",
    "my",
    "lord",
    ";",
    "what",
    "news",
    "from",
    "France",
    "?",
    "I",
    "know",
)
OPTIMIZERS = ("muon", "adamw")
GIT = ["git", "-c", "user.name=benchmark", "-c", "user.email=benchmark@example.org"]
USABLE = "body[data-drawn]"


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=5000, metavar="N", help="of a run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        repository, page = Path(folder), Path(folder) / "experiments.html"
        write_runs(repository, arguments.runs, arguments.steps)
        result: dict[str, Any] = {"runs": arguments.runs, "steps": arguments.steps, "cpu": cpu_name()}
        result["make_s"], result["make_cpu_s"] = making(repository, page, arguments.repeats)
        result["megabytes"] = round(page.stat().st_size / 1e6, 2)
        result |= opening(page, arguments.repeats)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def making(repository: Path, page: Path, repeats: int) -> tuple[float, float]:
    """Median seconds of the whole command, with Python's start, and of the CPU. The cache has Vega already."""
    command = [sys.executable, "-P", "-m", "gpt2", "report", "--output", str(page)]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    seconds, cpu_seconds = [], []
    for _ in range(repeats + 1):
        started, cpu_started = time.perf_counter(), cpu_of_children()
        subprocess.run(command, cwd=repository, env=environment, check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(cpu_of_children() - cpu_started)
    return round(statistics.median(seconds[1:]), 2), round(statistics.median(cpu_seconds[1:]), 2)


def cpu_of_children() -> float:
    """Seconds of the CPU of all processes that this one started and that ended."""
    times = os.times()
    return times.children_user + times.children_system


def opening(page: Path, repeats: int) -> dict[str, Any]:
    """Median milliseconds from the navigation until the page is usable, and of the CPU in its thread; the requests.

    Usable: the text is there, the largest chart is drawn, and the controls work.
    """
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        return {}
    from playwright.sync_api import sync_playwright

    requests: list[str] = []
    until_usable_ms, cpu_ms = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(repeats):
            tab = browser.new_page(viewport={"width": 1200, "height": 900}, offline=True)
            tab.on("request", lambda request: requests.append(request.url))
            session = tab.context.new_cdp_session(tab)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})
            tab.goto(page.as_uri(), wait_until="commit")
            tab.wait_for_selector(USABLE, state="attached")
            metrics = {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}
            cpu_ms.append(1000 * metrics["TaskDuration"])
            until_usable_ms.append(float(tab.get_attribute("body", "data-drawn-ms") or "nan"))
            tab.close()
        browser.close()
    fetched = [url for url in requests if not url.startswith(("file:", "data:"))]
    return {
        "until_usable_ms": round(statistics.median(until_usable_ms)),
        "until_usable_cpu_ms": round(statistics.median(cpu_ms)),
        "requests": len(fetched),
    }


def write_runs(folder: Path, count: int, steps: int = 500) -> None:
    """A git repository with the files of `count` invented experiments. Runs from the root of the project."""
    folder.mkdir(exist_ok=True)

    def git(*arguments: str) -> str:
        done = subprocess.run([*GIT, *arguments], cwd=folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    params = Path(__file__).parents[1].joinpath("params.yaml").read_text(encoding="utf-8")
    git("init", "-q", "-b", "main")
    (folder / "params.yaml").write_text(params, encoding="utf-8")
    git("add", "-A")
    git("commit", "-q", "-m", "start")
    head = git("rev-parse", "HEAD")
    for number in range(count):
        draw = np.random.default_rng(number)
        for path, content in files_of_a_run(draw, number, steps, params).items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content, encoding="utf-8")
        git("add", "-A")
        git("commit", "-q", "-m", f"run {number}")
        git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/run-{number:02}", "HEAD")
        git("reset", "-q", "--hard", head)


def files_of_a_run(draw: np.random.Generator, number: int, steps: int, params: str) -> dict[str, str]:
    """The files that a run leaves for git, by their path."""
    import pandas as pd

    learning_rate = round(float(draw.choice([1e-3, 3e-3, 6e-3, 1e-2])), 5)
    optimizer = str(draw.choice(OPTIMIZERS))
    changed = params.replace("learning_rate: 6.0e-3", f"learning_rate: {learning_rate}", 1)
    changed = changed.replace("optimizer: muon", f"optimizer: {optimizer}").replace("seed: 1337", f"seed: {number}")
    step = np.arange(10, steps + 1, 10)
    level = 4.4 + 0.3 * draw.random()
    loss = level + (10.8 - level) * np.exp(-step / (0.1 * steps)) + 0.08 * draw.standard_normal(len(step))
    is_evaluated = step % max(10, steps // 20) < 10
    speed = 4400 + 150 * draw.standard_normal(len(step))
    history = pd.DataFrame(
        {
            "step": step,
            "train_loss": loss,
            "val_loss": np.where(is_evaluated, loss + 0.1, np.nan),
            "learning_rate": learning_rate * np.minimum(1, step / 20) * (1 - step / steps),
            "grad_norm": 1 + np.exp(draw.standard_normal(len(step))),
            "tokens_per_s": speed,
            "mfu": speed / 1e4,
            "peak_memory_bytes": 10**9 + 10**7 * number,
            "tokens": step * 1024,
            "elapsed_s": np.cumsum(10240 / speed),
        }
    )
    final = float(loss[-1] + 0.1)
    bits = final / math.log(2) / 3.1
    texts = [f" {word}" for word in draw.choice(WORDS, 120)]
    passage = np.abs(np.random.default_rng(0).exponential(4, 255) + draw.standard_normal(255))
    tokens = [f" {WORDS[(7 * place) % len(WORDS)]}" for place in range(256)]
    train = {
        "best_val_loss": final,
        "best_step": steps,
        "steps": steps,
        "tokens": steps * 1024,
        "parameters": 16_058_112,
        "tokens_per_s": 4400,
        "elapsed_s": float(history["elapsed_s"].iloc[-1]),
        "peak_memory_bytes": 10**9 + 10**7 * number,
        "precision": "bfloat16",
    }
    evaluate = {
        "loss": final,
        "perplexity": math.exp(final),
        "bits_per_byte": bits,
        "bits_per_byte_low": bits - 0.03,
        "bits_per_byte_high": bits + 0.03,
        "tokens": 36058,
        "bytes": 111539,
    }
    samples = [{"prompt": f"Prompt {i}", "sample": "".join(draw.permutation(texts))} for i in range(3)]
    return {
        "params.yaml": changed,
        "reports/train/history.csv": history.to_csv(index=False, float_format="%.6g"),
        "reports/train/metrics.json": json.dumps(train),
        "reports/train/environment.json": json.dumps({"dirty": False, "versions": {"torch": "2.13.0"}, "threads": 2}),
        "reports/evaluate/metrics.json": json.dumps(evaluate),
        "reports/evaluate/samples.json": json.dumps(samples),
        "reports/evaluate/passage.json": json.dumps({"tokens": tokens, "losses": [None, *passage.round(4).tolist()]}),
    }


def cpu_name() -> str:
    """The model of the CPU, as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
