"""The bar charts of the benchmarks."""

from collections.abc import Sequence

from matplotlib.axes import Axes

OURS, PEER, BOUND = "#c2410c", "#94a3b8", "#cbd5e1"


def draw_bars(
    axes: Axes, names: Sequence[str], values: Sequence[float], labels: Sequence[str], colors: Sequence[str], title: str
) -> None:
    """Horizontal bars with a label at the end of each."""
    bars = axes.barh(names, values, color=colors)
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.18)
    axes.spines[["top", "right"]].set_visible(False)
