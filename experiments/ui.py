"""`make ui`: MLflow's page, with a link to the runs, best first, and the columns in which they differ.

The columns are a view that MLflow keeps as a tag of the experiment; the link names it.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.registry import new_client, tracking_uri
from gpt2.errors import GPT2Error
from stages.process import redact_secrets
from stages.tracking.uploader import EXPERIMENT, EXPERIMENT_TAGS

if TYPE_CHECKING:
    from mlflow import MlflowClient

HOST, PORT = "127.0.0.1", 5000
VIEW = "gpt2"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
ORDER = "metrics.`evaluate/loss`"
METRICS = ("evaluate/loss", "evaluate/bits_per_byte", "val/loss", "train/tokens_per_s")
TAGS = ("dvc.experiment",)
MAX_PARAMS = 6
MAX_RUNS = 200
START_TIMEOUT_S = 60


def main() -> int:
    """Serves the page until it is interrupted. Returns the exit code."""
    root = Path.cwd()
    try:
        uri = tracking_uri(root)
        client = new_client(root)
        path = link(client)
    except GPT2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:  # any error of MLflow
        print(f"error: MLflow does not answer ({redact_secrets(str(error))[:200]})", file=sys.stderr)
        return 2
    if uri.startswith(("http://", "https://")):  # a server that runs already
        print(f"The runs: {redact_secrets(uri).rstrip('/')}/{path}")
        return 0
    if is_taken(PORT):
        print(
            f"error: port {PORT} is in use; stop the program that uses it, perhaps another `make ui`", file=sys.stderr
        )
        return 2
    address = f"http://{HOST}:{PORT}"
    threading.Thread(target=announce, args=(address, f"{address}/{path}"), daemon=True).start()
    command = ["-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", HOST, "--port", str(PORT)]
    try:
        return subprocess.call([sys.executable, *command], env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"})
    except KeyboardInterrupt:
        return 130


def is_taken(port: int) -> bool:
    """Whether a program listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def announce(address: str, page: str) -> None:
    """Prints the link once the server answers."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()  # noqa: S310 - our own server
        except OSError:
            time.sleep(0.3)
        else:
            print(f"\nThe runs: {page}\n", flush=True)
            return


def link(client: "MlflowClient") -> str:
    """The path and query of the page of runs. Writes its view to the experiment. Raises any error of MLflow."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return ""
    runs = client.search_runs([experiment.experiment_id], max_results=MAX_RUNS)
    tags = {**EXPERIMENT_TAGS, VIEW_TAG: json.dumps(view(run.data.params for run in runs))}
    for name, value in tags.items():
        if experiment.tags.get(name) != value:
            client.set_experiment_tag(experiment.experiment_id, name, value)
    return f"#/experiments/{experiment.experiment_id}/runs?viewStateShareKey={VIEW}&workflowType=machine_learning"


def view(params: Iterable[dict[str, str]]) -> dict[str, Any]:
    """The state of MLflow's table of runs: sorted by loss, with a column for each param that differs."""
    return {
        "orderByKey": ORDER,
        "orderByAsc": True,
        "selectedColumns": [
            *(f"metrics.`{name}`" for name in METRICS),
            *(f"params.`{name}`" for name in differing(list(params))[:MAX_PARAMS]),
            *(f"tags.`{name}`" for name in TAGS),
            "attributes.`Models`",
        ],
    }


def differing(runs: list[dict[str, str]]) -> list[str]:
    """The params that differ between runs: those of the model and of training first."""
    names = {name for params in runs for name in params}
    found = [name for name in sorted(names) if len({params.get(name) for params in runs}) > 1]
    return sorted(found, key=lambda name: name.partition(".")[0] not in ("model", "train"))


if __name__ == "__main__":
    sys.exit(main())
