"""Writes reports/tuning.md: the experiments `tune-...` from MLflow, best first.

python -m tools.tuning
"""

import os
from pathlib import Path
from typing import Any

from stages.params import load_params
from stages.tracking.description import flatten
from stages.tracking.uploader import EXPERIMENT

REPORT = Path("reports/tuning.md")
PREFIX = "tune-"


def main() -> None:
    """Reads the runs and writes the table."""
    import mlflow

    mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found = client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'") if experiment else []
    rows = [row_of(client, run) for run in found if run.data.tags.get("dvc.experiment", "").startswith(PREFIX)]
    newest = {row["name"]: row for row in sorted(rows, key=lambda row: row["start"])}
    REPORT.write_text(table(list(newest.values())))
    print(f"{REPORT}: {len(newest)} experiments")


def row_of(client: Any, run: Any) -> dict[str, Any]:
    """The table's row of a run."""
    losses = client.get_metric_history(run.info.run_id, "val/loss")
    speed = [metric.value for metric in client.get_metric_history(run.info.run_id, "train/tokens_per_s")]
    times_ms = [metric.timestamp for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    return {
        "name": run.data.tags["dvc.experiment"],
        "start": run.info.start_time,
        "params": run.data.params,
        "loss": min(metric.value for metric in losses),
        "tokens_per_s": sorted(speed)[len(speed) // 2],
        "seconds": (max(times_ms) - min(times_ms)) / 1000,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table: each experiment and its changes to the preset `laptop`."""
    laptop = flatten(load_params(Path("presets/laptop.yaml")))
    lines = [
        "# Tuning of the preset `laptop`",
        "",
        "Made by `make tuning` from MLflow's records of the experiments `tune-...`: the lowest validation loss of each "
        "and its changes to the preset as it was then.",
        "",
        "| experiment | changes | validation loss | tokens/s | seconds of training |",
        "|---|---|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: row["loss"]):
        changes = [f"{key} {row['params'].get(key)}" for key in laptop if row["params"].get(key) != laptop[key]]
        shown = ", ".join(change.removeprefix("train.") for change in changes) or "none"
        lines.append(
            f"| {row['name']} | {shown} | {row['loss']:.3f} | {row['tokens_per_s']:,.0f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
