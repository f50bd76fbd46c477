"""Verdicts on settings: better, worse, or not distinguishable."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.settings import METRICS, TRAIN_KEYS, Metric, Setting
from experiments.statistics import (
    LEVEL,
    NO_TEXT,
    Difference,
    Spread,
    difference,
    paired_difference,
    pooled,
    seed_spread,
    text_noise,
)

BETTER, WORSE, SAME = "better", "worse", "the same"
NOT_DISTINGUISHABLE, UNKNOWN = "not distinguishable", "one seed each cannot tell"
MIN_PAIRS = 3
"""Seeds that two settings share, from which on their runs are compared in pairs."""
MAX_SAME = 20
"""Further settings whose runs say how seeds vary within a text; more add nothing but time."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on one metric of setting B against setting A.

    change: B minus A, in the metric's unit, or as the logarithm of a ratio. spread: of seeds; of pairs, that of their
    differences. pairs: of runs with one seed; 0 if they were not compared in pairs. models: the interval of the change
    for these models on texts like this one; None for speed and memory.
    """

    metric: Metric
    word: str
    change: Difference
    spread: Spread
    pairs: int
    models: tuple[float, float] | None


def judge(
    a: Setting,
    b: Setting,
    metric: Metric,
    *,
    others: Sequence[Setting] = (),
    siblings: Sequence[Setting] = (),
    comparisons: int = 1,
) -> Verdict | None:
    """Judges setting B against setting A; None if a run lacks the metric.

    From three shared seeds on, the losses of runs with one seed are compared in pairs, and other runs do not count. A
    seed means the same initial weights for one architecture, and the same order of the data, so pairs of similar
    settings differ much less than any two runs (common random numbers).

    others: further settings with several seeds, which say how much seeds vary. siblings: all runs that there are of A
    and B, if they are more than the judged ones. comparisons: that are made together; their chance to have one wrong
    "better" or "worse" is that of one (Bonferroni's correction; Dunn, 1961, https://doi.org/10.2307/2282330).
    """
    is_on_text = metric not in TRAIN_KEYS
    shared = [seed for seed in a.seeds if seed is not None and seed in b.seeds] if is_on_text else []
    if len(shared) >= MIN_PAIRS:
        a, b = a.only(shared), b.only(shared)
    values_a, values_b = (_comparable(setting, metric) for setting in (a, b))
    if not values_a or not values_b:
        return None
    level, text = LEVEL / comparisons, NO_TEXT
    if is_on_text:
        same = [setting.segments(metric) for setting in [*siblings, *others][:MAX_SAME]]
        text = text_noise(a.segments(metric), b.segments(metric), a.weights(metric), level=level, same=same)
    if len(shared) >= MIN_PAIRS:
        spread = pooled([[after - before for before, after in zip(values_a, values_b, strict=True)]])
        change = paired_difference(values_a, values_b, text, level=level)
    else:
        shared = []
        own = [_comparable(setting, metric) for setting in (siblings or (a, b))]
        spread = seed_spread(own, [_comparable(setting, metric) for setting in others])
        change = difference(values_a, values_b, spread, text, level=level)
    models = (text.low, text.high) if is_on_text else None
    return Verdict(metric, _word(metric, change), change, spread, len(shared), models)


def judge_all(
    a: Setting, b: Setting, *, others: Sequence[Setting] = (), siblings: Sequence[Setting] = (), comparisons: int = 1
) -> list[Verdict]:
    """The verdicts on all metrics that both settings have, the loss first."""
    found = (judge(a, b, metric, others=others, siblings=siblings, comparisons=comparisons) for metric in METRICS)
    return [verdict for verdict in found if verdict is not None]


def _comparable(setting: Setting, metric: Metric) -> list[float]:
    """The values of the runs; their logarithms where ratios are compared."""
    values = setting.values(metric)
    return values if metric.unit else [math.log(value) for value in values]


def _word(metric: Metric, change: Difference) -> str:
    if metric.negligible and abs(change.value) < metric.negligible:
        return SAME
    if change.low is None:
        return UNKNOWN
    if not change.sign:
        return NOT_DISTINGUISHABLE
    return BETTER if (change.sign < 0) == metric.lower_is_better else WORSE
