"""The picture of a ladder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullFormatter

from experiments.scaling.law import Fit, Interval, Point
from stages.reports import save_figure

TARGET_COLOR = "#c2410c"
FLOPS_PER_PARAMETER_AND_TOKEN = 6
"""Of training: https://arxiv.org/abs/2001.08361."""


def draw(
    points: Sequence[Point],
    fit: Fit,
    left_out: Sequence[tuple[Point, Interval]],
    target: tuple[int, float, Interval],
    path: Path,
) -> None:
    """Left: loss by FLOPs, of each size. Right: predicted and measured loss.

    left_out: runs of the largest size, as a fit to the others predicts them. target: parameters, tokens and the
    predicted loss of the larger run.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_flops, by_loss = figure.subplots(1, 2)
    sizes = sorted({point.parameters for point in points})
    colors = {size: str(f"C{index}") for index, size in enumerate(sizes)}
    longest = max(point.tokens for point in points)
    for size in sizes:
        runs = sorted((point for point in points if point.parameters == size), key=lambda point: point.tokens)
        tokens = np.geomspace(runs[0].tokens / 1.5, 4 * longest)
        flops = FLOPS_PER_PARAMETER_AND_TOKEN * size * tokens
        by_flops.plot(flops, [fit.law.loss(size, each) for each in tokens], color=colors[size], linewidth=1)
        by_flops.plot(
            [FLOPS_PER_PARAMETER_AND_TOKEN * size * run.tokens for run in runs],
            [run.loss for run in runs],
            "o",
            color=colors[size],
            markersize=5,
            label=f"{size / 1e6:.3g}M parameters",
        )
    parameters, tokens_of_target, predicted = target
    tokens = np.geomspace(longest / 4, tokens_of_target)
    flops = FLOPS_PER_PARAMETER_AND_TOKEN * parameters * tokens
    by_flops.plot(flops, [fit.law.loss(parameters, each) for each in tokens], "--", color=TARGET_COLOR, linewidth=1)
    flops_of_target = FLOPS_PER_PARAMETER_AND_TOKEN * parameters * tokens_of_target
    by_flops.errorbar(
        [flops_of_target],
        [predicted.value],
        [[predicted.value - predicted.low], [predicted.high - predicted.value]],
        fmt="D",
        color=TARGET_COLOR,
        capsize=4,
        label=f"predicted: {parameters / 1e6:.3g}M",
    )
    by_flops.set(xscale="log", xlabel="FLOPs of training", ylabel="validation loss, nats per token", title="Loss")
    by_flops.xaxis.set_major_formatter(LogFormatter())  # without the fonts of formulas
    by_flops.xaxis.set_minor_formatter(NullFormatter())
    by_flops.legend(frameon=False, fontsize=8)

    for size in sizes:
        runs = [point for point in points if point.parameters == size]
        fitted = [fit.law.loss(run.parameters, run.tokens) for run in runs]
        by_loss.plot([run.loss for run in runs], fitted, "o", color=colors[size], markersize=5)
    for run, interval in left_out:
        by_loss.errorbar(
            [run.loss],
            [interval.value],
            [[interval.value - interval.low], [interval.high - interval.value]],
            fmt="s",
            mfc="white",
            color=colors[run.parameters],
            capsize=4,
            label="left out of the fit" if run is left_out[0][0] else None,
        )
    ends = [min(point.loss for point in points), max(point.loss for point in points)]
    by_loss.plot(ends, ends, color="0.7", linewidth=1, zorder=0)
    by_loss.set(xlabel="measured loss", ylabel="loss by the law", title="The law beside the runs")
    by_loss.legend(frameon=False, fontsize=8)
    for axes in (by_flops, by_loss):
        axes.grid(alpha=0.25)
    save_figure(figure, path)
