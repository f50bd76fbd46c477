"""Failing tracking servers and databases during training with the real command line."""

import json
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.faults.commands import PLAIN, SHIM, Command, Trained, forget, results, steps_logged_twice
from tests.faults.result import Result
from tests.project import Project

MOST_SECONDS_ADDED = 5.0
RUN = {"info": {"run_id": "1" * 32, "experiment_id": "1", "status": "RUNNING", "start_time": 1}, "data": {}}
ANSWERS = {
    "experiments/get-by-name": {"experiment": {"experiment_id": "1", "name": "gpt2", "lifecycle_stage": "active"}},
    "runs/create": {"run": RUN},
    "runs/get": {"run": RUN},
    "runs/update": {"run_info": RUN["info"]},
}


class Server(ThreadingHTTPServer):
    """A stub of MLflow's REST API, which stores nothing. Slow, broken, or closed after some requests."""

    daemon_threads = True

    def __init__(self, delay_s: float = 0, status: int = 200, lives_for: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.delay_s, self.status, self.lives_for, self.requests = delay_s, status, lives_for, 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests += 1
        if self.server.lives_for is not None and self.server.requests > self.server.lives_for:
            self.connection.close()
            return
        time.sleep(self.server.delay_s)
        path = self.path.partition("?")[0]
        body = json.dumps(next((answer for end, answer in ANSWERS.items() if path.endswith(end)), {})).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(OSError):  # the client may time out
            self.wfile.write(body)

    do_GET = do_POST = do_PATCH = answer  # noqa: N815 - so the base class calls them

    def log_message(self, *_: Any) -> None:
        pass


Where = Callable[[Project], AbstractContextManager[dict[str, str]]]


def at_server(**options: Any) -> Where:
    """A stub server as the tracking server."""

    @contextmanager
    def where(_: Project) -> Iterator[dict[str, str]]:
        with Server(**options) as server:
            yield {"MLFLOW_TRACKING_URI": server.address}

    return where


@contextmanager
def black_hole(_: Project) -> Iterator[dict[str, str]]:
    with socket.create_server(("127.0.0.1", 0)) as listening:  # accepts connections and never responds
        yield {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{listening.getsockname()[1]}"}


@contextmanager
def locked(project: Project) -> Iterator[dict[str, str]]:
    connection = sqlite3.connect(project.folder / "mlflow.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield {}
    finally:
        connection.rollback()
        connection.close()


@contextmanager
def corrupt(project: Project) -> Iterator[dict[str, str]]:
    database = project.folder / "mlflow.db"
    whole = database.read_bytes()
    database.write_bytes(b"garbage, not a database" * 200)
    try:
        yield {}
    finally:
        database.write_bytes(whole)


FAULTS: dict[str, Where] = {
    "refused": lambda _: nullcontext({"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}),
    "black hole": black_hole,
    "5 s an answer": at_server(delay_s=5),
    "500": at_server(status=500),
    "dies during the run": at_server(lives_for=8),
    "database locked": locked,
    "database read-only": lambda project: nullcontext(
        {"MLFLOW_TRACKING_URI": f"sqlite:///file:{project.folder}/mlflow.db?mode=ro&uri=true"}
    ),
    "database corrupt": corrupt,
    "disk full": lambda _: nullcontext({"PYTHONPATH": str(SHIM), "FAULT_UPLOADER_FILE_BYTES": "4096"}),
}


def tracking_faults(folder: Path, trained: Trained, names: Iterable[str] = FAULTS) -> Result:
    """Each fault must cost one warning and at most 5 s; later, all records must be delivered, no step twice."""
    result = Result("tracking faults")
    project = trained.copy(folder / "tracking")
    for name in names:
        problem, added_s = with_fault(project, trained, name, trained.seconds)
        if not problem and added_s > MOST_SECONDS_ADDED:  # or other processes took the cores: once more, both runs now
            problem, added_s = with_fault(project, trained, name, trained.measured_s())
        result.notes.append(f"{name}: {added_s:+.1f} s")
        if not problem and added_s > MOST_SECONDS_ADDED:
            problem = f"{added_s:.1f} s more, a second time"
        if not problem:
            project.run("python", "-m", "stages.sync")
            problem = missing(project)
        result.add(problem and f"{name}: {problem}")
    return result


def with_fault(project: Project, trained: Trained, name: str, undisturbed_s: float) -> tuple[str | None, float]:
    """Runs a training run with a fault. Returns the problem, None if there is none, and the seconds added."""
    with FAULTS[name](project) as environment:
        took_s, run, code = timed(project, environment)
    output = run.output()
    problem = run.problem(code, 0)
    if not problem and output.count("WARNING") != 1:
        problem = f"{output.count('WARNING')} warnings: {output}"
    if not problem and results(project) != trained.expected:
        problem = "another result"
    return problem, took_s - undisturbed_s


def timed(project: Project, environment: dict[str, str]) -> tuple[float, Command, int]:
    """Runs a training run. Returns seconds, the command, and its exit code."""
    forget(project)
    started_s = time.monotonic()
    run = Command(project, PLAIN, **environment)
    code = run.wait()
    return time.monotonic() - started_s, run, code


def missing(project: Project) -> str | None:
    """Describes records of the last run that MLflow lacks or has twice; None if there are none."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    ours = project.read("models/run.json")["run_id"]
    experiment = client.get_experiment_by_name("gpt2").experiment_id
    runs = client.search_runs([experiment], f"tags.`pipeline.run_id` = '{ours}'")
    if len(runs) != 1 or runs[0].info.status != "FINISHED":
        return f"MLflow has the runs {[run.info.status for run in runs]}"
    (run,) = runs
    history = [row[0] for row in results(project)["live"]]
    steps = sorted(metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss"))
    if steps != history:
        return f"MLflow has the steps {steps}"
    if "reports/train/loss.png" not in [file.path for file in client.list_artifacts(run.info.run_id, "reports/train")]:
        return "MLflow lacks the pictures"
    if doubled := steps_logged_twice(project):
        return f"MLflow has steps twice: {doubled}"
    return None
