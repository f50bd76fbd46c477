"""Plots and tables in reports/."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
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
TRAIN_COLOR, VAL_COLOR = "#9db4d6", "#c2410c"
DOTS_PER_INCH = 110


def write_history(history: Sequence[dict[str, Any]], folder: Path) -> pd.DataFrame:
    """Writes the rows that training logged to history.csv, and those with a validation loss to validation.csv.

    Returns the table. The second file exists because DVC plots an empty cell as 0.
    """
    table = pd.DataFrame(history, columns=HISTORY_COLUMNS)
    _write_csv(table, folder / "history.csv")
    _write_csv(table.dropna(subset=["val_loss"])[["step", "val_loss"]], folder / "validation.csv")
    return table


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    write_text(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def draw_loss(history: pd.DataFrame, path: Path) -> None:
    """Plots training and validation loss by step, and marks the lowest validation loss."""
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
    axes.set(xlabel="step", ylabel="loss, nats per token", title="Loss")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    _save(figure, path)


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
    _save(figure, path)


def draw_passage(tokens: list[str], losses: npt.NDArray[np.float32], path: Path) -> None:
    """Plots a passage of text; the background colour of each token shows its loss.

    The first token has no loss: losses is (len(tokens) - 1,).
    """
    columns, row_height_in, character_in = 72, 0.25, 0.075
    colormap, full_scale_nats = mpl.colormaps["YlOrRd"], 10.0
    cells: list[tuple[int, int, str, float | None]] = []  # row, column, text, loss
    row = column = 0
    for text, loss in zip(tokens, [None, *losses.tolist()], strict=True):
        for part in text.replace("\t", " ").splitlines(keepends=True) or [text]:
            shown = part.rstrip("\n")
            if column + len(shown) > columns:
                row, column = row + 1, 0
            shown_or_mark = shown if shown or not part else "¶"
            cells.append((row, column, shown_or_mark, loss))
            column += len(shown_or_mark)
            if part.endswith("\n"):
                row, column = row + 1, 0
    rows = row + 1
    margin_in, scale_in = 0.15, 0.75
    width_in, text_in = columns * character_in + 2 * margin_in, rows * row_height_in
    height_in = margin_in + text_in + scale_in
    figure = Figure(figsize=(width_in, height_in))

    def axes_at(left_in: float, bottom_in: float, w_in: float, h_in: float) -> Axes:
        return figure.add_axes((left_in / width_in, bottom_in / height_in, w_in / width_in, h_in / height_in))

    axes = axes_at(margin_in, scale_in, columns * character_in, text_in)
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.axis("off")
    for r, c, text, loss in cells:
        color = "white" if loss is None else colormap(min(loss / full_scale_nats, 1.0) * 0.85)
        axes.add_patch(mpl.patches.Rectangle((c, r + 0.06), len(text), 0.88, color=color, linewidth=0))
        text = text.replace("$", r"\$")
        axes.text(c, r + 0.72, text, family="monospace", fontsize=8.6, parse_math=False)
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, full_scale_nats / 0.85), colormap)
    bar = figure.colorbar(scale, cax=axes_at(margin_in, 0.45, 3.2, 0.1), orientation="horizontal")
    bar.ax.set_xlim(0, full_scale_nats)
    bar.set_label(f"loss of each token, nats (mean of this passage: {losses.mean():.2f})", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    # no creation date or version, so that the same numbers result in the same file
    atomic_save(path, lambda temporary: figure.savefig(temporary, dpi=DOTS_PER_INCH, metadata={"Software": None}))
