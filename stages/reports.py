"""Plots and tables in reports/."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from gpt2.files import atomic_save, write_text

HISTORY_COLUMNS = [
    "step",
    "train_loss",
    "val_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_s",
    "mfu",
    "peak_memory_bytes",
    "tokens",
    "elapsed_s",
]
TRAIN_COLOR, VAL_COLOR, SAMPLE_COLOR = "#9db4d6", "#c2410c", "#1e3a8a"
DOTS_PER_INCH = 110


def write_history(history: Sequence[dict[str, Any]], folder: Path) -> pd.DataFrame:
    """Writes the rows that training logged to history.csv, and those with a validation loss to validation.csv.

    Returns the table. The second file exists because DVC plots an empty cell as 0.
    """
    table = pd.DataFrame(history, columns=HISTORY_COLUMNS)
    write_csv(table, folder / "history.csv")
    write_csv(table.dropna(subset=["val_loss"])[["step", "val_loss"]], folder / "validation.csv")
    return table


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Writes a table, with six digits."""
    write_text(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def draw_loss(
    history: pd.DataFrame,
    path: Path,
    metrics: Mapping[str, Any],
    *,
    epoch_steps: float,
    warning: str | None = None,
) -> None:
    """Plots training and validation loss by step and by epoch, and marks the lowest validation loss.

    metrics: the final ones; of them, the loss on a sample of the training text is marked. epoch_steps: in which the
    text is read once; later steps are shaded. warning: printed below.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(history["step"], history["train_loss"], color=TRAIN_COLOR, linewidth=1.2, label="training batch")
    evaluated = history.dropna(subset=["val_loss"])
    if len(evaluated):
        axes.plot(
            evaluated["step"],
            evaluated["val_loss"],
            color=VAL_COLOR,
            marker="o",
            markersize=4,
            label="held-out text",
        )
        best = evaluated.sort_values("val_loss").iloc[0]
        axes.annotate(
            f"{best['val_loss']:.3f}",
            (best["step"], best["val_loss"]),
            xytext=(0, 12),
            textcoords="offset points",
            ha="center",
            color=VAL_COLOR,
            fontweight="bold",
        )
        axes.axvline(best["step"], color=VAL_COLOR, linewidth=0.8, linestyle=":")
    last_step = history["step"].max()
    if metrics.get("train_sample_loss") is not None:
        axes.plot(
            last_step, metrics["train_sample_loss"], "D", color=SAMPLE_COLOR, label="training text, as held-out text"
        )
    if last_step > epoch_steps:
        axes.axvspan(epoch_steps, last_step, color="#64748b", alpha=0.07, linewidth=0, label="text read before")
    epochs = axes.secondary_xaxis(
        "top",
        functions=(lambda step: np.divide(step, epoch_steps), lambda epoch: np.multiply(epoch, epoch_steps)),
    )
    epochs.set_xlabel("epochs")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    if warning is not None:
        figure.supxlabel(textwrap.fill(warning, 110), fontsize=9, color=VAL_COLOR)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    save_figure(figure, path)


def draw_schedule(history: pd.DataFrame, path: Path) -> None:
    """Plots learning rate, gradient norm, tokens/s and model FLOPs utilization (MFU) by step."""
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    panels = [
        ("learning_rate", "learning rate"),
        ("grad_norm", "gradient norm\nbefore clipping"),
        ("tokens_per_s", "tokens/s"),
        ("mfu", "MFU"),
    ]
    for axes, (column, label) in zip(figure.subplots(len(panels), sharex=True), panels, strict=True):
        axes.plot(history["step"], history[column], color="#475569", linewidth=1.2)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    axes.set_xlabel("step")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG."""
    # no creation date or version, so that the same numbers result in the same file
    atomic_save(path, lambda temporary: figure.savefig(temporary, dpi=DOTS_PER_INCH, metadata={"Software": None}))
