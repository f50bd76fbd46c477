"""What a sweep leaves behind: reports/sweep/NAME/, the best trial, and MLflow's run of the whole sweep."""

import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.files import GitFiles
from experiments.report.page import write_report
from experiments.runs import Run
from experiments.sweeping.config import SweepConfig
from experiments.sweeping.study import INVALID, SAME_AS, SweepStudy, best_of, storage_errors
from gpt2.errors import one_line
from gpt2.files import write_text
from stages.process import echo, warn

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

REPORT = Path("reports/sweep")
FEWEST_TRIALS = 4
"""Complete ones, from which importances are computed."""
OBJECTIVE_METRIC = "sweep/objective"
"""The metric in MLflow: Optuna's value of the trial."""
PLOTS = (
    "plot_optimization_history",
    "plot_param_importances",
    "plot_parallel_coordinate",
    "plot_slice",
    "plot_intermediate_values",
)
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>body {{ font-family: system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}</style>
<script>{plotly}</script></head>
<body><h1>{title}</h1>{figures}</body></html>
"""


def finished(study: SweepStudy) -> "list[FrozenTrial]":
    """The trials that have ended and count."""
    return [trial for trial in study.counted() if trial.state.is_finished()]


def write(study: SweepStudy, definition: Mapping[str, Any]) -> None:
    """Writes reports/sweep/NAME/ and says which trial is the best, and how to adopt it."""
    with storage_errors(study.root):
        trials = finished(study)
    if not trials:
        return
    config, folder = study.config, REPORT / study.config.name
    importances = param_importances(study)
    write_text(folder / "summary.md", to_markdown(config, trials, importances))
    write_text(folder / "trials.csv", to_csv(config, trials))
    with suppress(ImportError):
        write_text(folder / "plots.html", to_html(study))
    if runs := runs_of(study.root, trials):
        write_report(runs, folder / "report.html")
    best = best_of(trials, config.direction)
    if best is not None:
        echo(f"the best of {len(trials)} trials: {config.objective} {best.value:.6g}, trial {best.number}")
        for name, value in best.params.items():
            echo(f"  {name}: {value}")
        name = best.user_attrs.get("experiment") or f"{config.name}-{best.user_attrs.get(SAME_AS, best.number):03d}"
        echo(f"adopt it: dvc exp apply {name}, then dvc repro")
    echo(f"{folder}/ has all trials; open plots.html and report.html in a browser")
    end_parent(definition.get("mlflow_run_id"), config, trials, folder, is_done=_is_done(study))


def runs_of(root: Path, trials: "list[FrozenTrial]") -> list[Run]:
    """The experiments that trials left."""
    left = [
        (str(trial.user_attrs["experiment"]), str(trial.user_attrs["commit"]))
        for trial in trials
        if "commit" in trial.user_attrs
    ]
    return [Run(name, commit, GitFiles(root, commit)) for name, commit in left]


def _is_done(study: SweepStudy) -> bool:
    budget = study.budget()
    return budget is None or len(finished(study)) >= budget


def param_importances(study: SweepStudy) -> dict[str, float]:
    """How much of the differences in the objective each param explains; empty if too few trials say so."""
    import optuna

    if sum(trial.state.name == "COMPLETE" for trial in finished(study)) < FEWEST_TRIALS:
        return {}
    try:
        with storage_errors(study.root):
            return dict(optuna.importance.get_param_importances(study.optuna))
    except (ValueError, RuntimeError, ImportError):  # too few trials, or all alike
        return {}


def to_markdown(config: SweepConfig, trials: "list[FrozenTrial]", importances: Mapping[str, float]) -> str:
    """The trials, the best first, and the importance of params."""
    sign = 1 if config.direction == "minimize" else -1
    ranked = sorted(
        trials, key=lambda trial: (trial.state.name != "COMPLETE", trial.value is None, sign * (trial.value or 0.0))
    )
    lines = [f"# Sweep {config.name}", "", f"{config.direction} `{config.objective}`, {len(trials)} trials.", ""]
    names = list(config.space)
    lines += ["| experiment | " + " | ".join((config.metric, "ended", *names)) + " |", "|---" * (len(names) + 3) + "|"]
    for trial in ranked:
        value = "" if trial.value is None else f"{trial.value:.5g}"
        cells = [experiment(config, trial), value, ended(trial), *(_cell(trial.params.get(name)) for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
    if importances:
        lines += ["", "| param | importance |", "|---|---:|"]
        lines += [f"| {name} | {share:.0%} |" for name, share in importances.items()]
    return "\n".join(lines) + "\n"


def experiment(config: SweepConfig, trial: "FrozenTrial") -> str:
    """The name of the DVC experiment with a trial's numbers."""
    return f"{config.name}-{trial.user_attrs.get(SAME_AS, trial.number):03d}"


def ended(trial: "FrozenTrial") -> str:
    """How a trial ended."""
    if SAME_AS in trial.user_attrs:
        return f"the same values as trial {trial.user_attrs[SAME_AS]}"
    return str(trial.user_attrs.get("ended", trial.user_attrs.get(INVALID, "complete")))


def _cell(value: Any) -> str:
    return (f"{value:.4g}" if isinstance(value, float) else str(value)).replace("|", "\\|")


def to_csv(config: SweepConfig, trials: "list[FrozenTrial]") -> str:
    """A row for each trial, with exact values."""
    import pandas as pd

    rows = [
        {
            "experiment": experiment(config, trial),
            "trial": trial.number,
            "state": trial.state.name,
            config.objective: trial.value,
            "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else None,
            **trial.params,
        }
        for trial in trials
    ]
    return str(pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def to_html(study: SweepStudy) -> str:
    """Optuna's plots in one page that needs no network."""
    import html

    from optuna import visualization
    from plotly.offline import get_plotlyjs

    figures = []
    for name in PLOTS:
        with suppress(ValueError, RuntimeError), warnings.catch_warnings():  # too few trials
            warnings.simplefilter("ignore")
            figure = getattr(visualization, name)(study.optuna)
            figures.append(figure.to_html(full_html=False, include_plotlyjs=False, default_height="32rem"))
    title = html.escape(f"Sweep {study.config.name}")
    return PAGE.format(title=title, plotly=get_plotlyjs(), figures="\n".join(figures))


def start_parent(config: SweepConfig, base: str) -> str | None:
    """Creates MLflow's run of the sweep, the parent of its trials. Returns its id; None if MLflow does not answer."""
    try:
        from stages.tracking.uploader import MlflowStore

        store = MlflowStore()
        tags = {"sweep": config.name, "git.commit": base, "sweep.objective": f"{config.direction} {config.objective}"}
        run = store.client.create_run(store.experiment_id, tags=tags, run_name=f"sweep {config.name}")
        for name, param in config.space.items():
            store.client.log_param(run.info.run_id, name.replace(",", ""), str(param)[:500])
    except Exception as error:  # any error of MLflow
        warn(f"MLflow does not answer ({one_line(error, 120)}); its runs of the trials will have no parent")
        return None
    return str(run.info.run_id)


def end_parent(
    run_id: str | None, config: SweepConfig, trials: "list[FrozenTrial]", folder: Path, *, is_done: bool
) -> None:
    """Logs the result to MLflow's run of the sweep, and the objective to the runs of its trials."""
    if run_id is None:
        return
    best = best_of(trials, config.direction)
    try:
        from stages.sync import sync
        from stages.tracking.protocol import records
        from stages.tracking.uploader import MlflowStore

        if records():  # of trials that ended before MLflow had all of them
            sync()
        store = MlflowStore()
        client = store.client
        known = {experiment(config, trial): trial for trial in trials if SAME_AS not in trial.user_attrs}
        for run in client.search_runs([store.experiment_id], f"tags.`dvc.experiment` LIKE '{config.name}-%'"):
            trial = known.get(run.data.tags["dvc.experiment"])
            if trial is not None and trial.value is not None and OBJECTIVE_METRIC not in run.data.metrics:
                client.log_metric(run.info.run_id, OBJECTIVE_METRIC, trial.value)
        if best is not None and best.value is not None:
            client.log_metric(run_id, f"best {config.objective}".replace(".", "/"), best.value)
            client.set_tag(run_id, "sweep.best", experiment(config, best))
        for file in sorted(folder.iterdir()):
            client.log_artifact(run_id, str(file), "reports/sweep")
        client.set_terminated(run_id, "FINISHED" if is_done else "KILLED")
    except Exception as error:  # any error of MLflow
        warn(f"MLflow does not answer ({one_line(error, 120)}); {folder} has the results")
