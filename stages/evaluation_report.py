"""Tables, pictures and samples in reports/evaluate/."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from gpt2.config import EvaluateConfig
from gpt2.data.token_files import TokenArray
from gpt2.evaluation.breakdown import Breakdown, ConfidenceBin, FrequencyBin, PositionBin
from gpt2.files import write_json
from gpt2.inference.detokenizer import Detokenizer
from stages.reports import save_figure, write_csv

LINE_COLOR, BAR_COLOR, MARK_COLOR = "#1d4ed8", "#9db4d6", "#c2410c"
MAX_HISTOGRAM_BINS = 40


def write_tables(breakdown: Breakdown, folder: Path) -> None:
    """Writes loss_by_position.csv, calibration.csv and loss_by_frequency.csv, a row for each bin."""
    write_csv(pd.DataFrame(map(asdict, breakdown.positions)), folder / "loss_by_position.csv")
    write_csv(pd.DataFrame(map(asdict, breakdown.calibration)), folder / "calibration.csv")
    rows = [{"occurrences": occurrences(each), **asdict(each)} for each in breakdown.frequencies]
    write_csv(pd.DataFrame(rows), folder / "loss_by_frequency.csv")


def occurrences(frequency: FrequencyBin) -> str:
    """The range of a bin: "0", "1-10", "101-1k"."""
    if frequency.most == 0:
        return "0"
    first = frequency.fewest if frequency.fewest < 1000 else f"{_short(frequency.fewest - 1)}"
    return f"{first}-{_short(frequency.most)}"


def _short(power_of_ten: int) -> str:
    for size, letter in (10**9, "G"), (10**6, "M"), (10**3, "k"):
        if power_of_ten >= size:
            return f"{power_of_ten // size}{letter}"
    return str(power_of_ten)


def draw_breakdown(breakdown: Breakdown, bits_per_byte: float, path: Path) -> None:
    """Plots the loss by position and by frequency, the reliability diagram, and the bits per byte of the units."""
    figure = Figure(figsize=(9.6, 7.2), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    (position, reliability), (frequency, histogram) = figure.subplots(2, 2)
    _draw_positions(position, breakdown.positions)
    _draw_reliability(reliability, breakdown.calibration, breakdown.ece)
    _draw_frequencies(frequency, breakdown.frequencies)
    _draw_histogram(histogram, breakdown, bits_per_byte)
    for axes in (position, reliability, frequency, histogram):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
    save_figure(figure, path)


def _draw_positions(axes: Axes, bins: Sequence[PositionBin]) -> None:
    axes.set(title="Loss by position", xlabel="tokens of context before the token", ylabel="loss, nats per token")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.grid(alpha=0.25)
    centers = [(each.first * each.last) ** 0.5 for each in bins]
    low, high = [each.low for each in bins], [each.high for each in bins]
    axes.fill_between(centers, low, high, color=BAR_COLOR, alpha=0.5, linewidth=0, label="95 % interval")
    axes.plot(centers, [each.loss for each in bins], color=LINE_COLOR, marker="o", markersize=3.5, linewidth=1.4)
    axes.legend(frameon=False)


def _draw_reliability(axes: Axes, bins: Sequence[ConfidenceBin], error: float) -> None:
    axes.set(
        title="Calibration of the likeliest token",
        xlabel="its probability",
        ylabel="how often it is right",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axes.grid(alpha=0.25)
    axes.bar(
        [each.low for each in bins],
        [each.accuracy for each in bins],
        width=[each.high - each.low for each in bins],
        align="edge",
        color=BAR_COLOR,
        edgecolor="white",
    )
    axes.plot([0, 1], [0, 1], color="#475569", linestyle="--", linewidth=1, label="perfectly calibrated")
    axes.plot(
        [each.confidence for each in bins],
        [each.accuracy for each in bins],
        color=LINE_COLOR,
        marker="o",
        markersize=3.5,
        linewidth=0,
        label=f"mean of a bin (ECE {error:.3f})",
    )
    axes.legend(frameon=False, loc="upper left")


def _draw_frequencies(axes: Axes, bins: Sequence[FrequencyBin]) -> None:
    axes.set(
        title="Loss by frequency of the token",
        xlabel="occurrences in the training tokens\n(below: share of the held-out tokens)",
        ylabel="loss, nats per token",
    )
    bars = axes.bar(range(len(bins)), [each.loss for each in bins], color=BAR_COLOR, width=0.75)
    axes.bar_label(bars, fmt="{:.2f}", padding=2, fontsize=9)
    axes.margins(y=0.12)
    names = [occurrences(each).replace("-", "–") for each in bins]
    shares = [f"{100 * each.share:.1f} %" for each in bins]
    axes.set_xticks(
        range(len(bins)), [f"{name}\n{share}" for name, share in zip(names, shares, strict=True)], fontsize=9
    )
    axes.set_axisbelow(True)
    axes.grid(alpha=0.25, axis="y")


def _draw_histogram(axes: Axes, breakdown: Breakdown, bits_per_byte: float) -> None:
    low, high = breakdown.bits_per_byte_low, breakdown.bits_per_byte_high
    values = breakdown.bits_per_byte_of_units
    axes.set(
        title=f"Bits per byte: {bits_per_byte:.3f} (95 % interval {low:.3f} to {high:.3f})",
        xlabel=f"bits per byte of each of the {len(values):,} {breakdown.units}",
        ylabel=breakdown.units,
    )
    lowest, highest = np.percentile(values, [0.5, 99.5])
    bins = min(MAX_HISTOGRAM_BINS, math.ceil(len(values) ** 0.5))
    axes.hist(values, bins=bins, range=(lowest, max(highest, lowest + 1e-3)), color=BAR_COLOR, edgecolor="white")
    axes.axvspan(low, high, color=MARK_COLOR, alpha=0.3, linewidth=0)
    axes.axvline(bits_per_byte, color=MARK_COLOR, linewidth=1.4)
    axes.set_axisbelow(True)
    axes.grid(alpha=0.25, axis="y")


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
    save_figure(figure, path)


def write_passage(passage: TokenArray, losses: npt.NDArray[np.float32], path: Path) -> None:
    """Writes the texts of the tokens of a passage, and the loss of each in nats: {"tokens": [...], "losses": [...]}.

    The texts joined are the text of the passage: the tokens of a character that takes several have no text, but the
    last of them. The first token has no loss: losses is (len(passage) - 1,), and the file has null there.
    """
    detokenizer, last = Detokenizer(), len(passage) - 1
    texts = [detokenizer.push(int(token), last=position == last) for position, token in enumerate(passage)]
    rounded = [round(float(loss), 4) for loss in losses]
    write_json(path, {"tokens": texts, "losses": [None, *rounded]})


def describe_samples(config: EvaluateConfig, prompts: list[str], samples: list[str], verbatim: str, loss: float) -> str:
    """The samples as Markdown."""
    parts = [
        "# Samples",
        f"Validation loss {loss:.4f} nats per token. {config.max_new_tokens} tokens for each prompt, "
        f"temperature {config.temperature}, top-k {config.top_k}, top-p {config.top_p}, seeds from {config.seed} on. "
        "The prompt is in bold.",
        f"The longest passage copied verbatim from the training text has {len(verbatim)} characters"
        + (f": `{' ⏎ '.join(verbatim.split(chr(10)))}`" if verbatim else ""),
    ]
    for prompt, sample in zip(prompts, samples, strict=True):
        shown_prompt = prompt.strip().replace("\n", " ⏎ ") or "(empty)"
        body = "\n".join(f"    {line}" for line in sample.split("\n"))
        parts.append(f"## **{shown_prompt}**\n\n{body.rstrip()}")
    return "\n\n".join(parts) + "\n"
