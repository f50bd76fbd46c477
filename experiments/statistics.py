"""Whether one setting of a training is better than another, from few runs of each.

Two things vary: the seed of a run, and the text that its loss is measured on. The paired differences of the losses of
segments say how a difference varies over texts like this one. The spread of runs that differ only in their seed says
how it varies over seeds. They are crossed random effects, whose variances add; the part that is in both, the noise of a
seed in a segment, counts twice, so the sum is on the safe side (Owen, The pigeonhole bootstrap, 2007,
https://arxiv.org/abs/0712.1111).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
RESAMPLES = 2000
BOOTSTRAP_SEED = 0
LEVEL = 0.03
"""Of cases without a difference, those that may be called different: 3 in 100, so that the 5 in 100 that people expect
hold for losses of trained models, too, whose tails are longer than those of a normal distribution
(`benchmarks/compare.py`)."""
SIGNIFICANT = 0.05
POWER = 0.8
MAX_MORE_SEEDS = 100


@dataclass(frozen=True)
class Spread:
    """The variance of runs that differ only in their seed. runs, groups: that it was found from. df: runs - groups."""

    variance: float
    runs: int
    groups: int

    @property
    def df(self) -> int:
        """Degrees of freedom; 0 if the spread is not known."""
        return self.runs - self.groups


@dataclass(frozen=True)
class TextNoise:
    """How the difference of two sets of models varies over texts like the one they were measured on.

    variance: of the mean difference. low, high: the interval of the difference of these models. seed_variance: the
    part of the variance that one run of a setting has for its seed, so that more seeds make it smaller; None if no
    setting has two.
    """

    variance: float
    low: float
    high: float
    seed_variance: float | None


NO_TEXT = TextNoise(0.0, 0.0, 0.0, 0.0)
"""Of what is not measured on a text: speed and memory."""


@dataclass(frozen=True)
class Difference:
    """The mean of setting B minus that of setting A.

    low, high: its confidence interval; None if the spread of seeds is not known. more_seeds: of each setting, until a
    difference of this size would be found 80 times in 100; None if more than 100, or not known.
    """

    value: float
    low: float | None
    high: float | None
    more_seeds: int | None

    @property
    def sign(self) -> int:
        """-1 or 1 if the interval is below or above 0, otherwise 0."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return 0
        return 1 if self.low > 0 else -1


def pooled(groups: Sequence[Sequence[float]]) -> Spread:
    """The pooled variance of groups that each have a mean of their own. A group of one says nothing."""
    told = [np.array(group, dtype=np.float64) for group in groups if len(group) > 1]
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in told)
    runs = sum(map(len, told))
    return Spread(squares / max(1, runs - len(told)), runs, len(told))


def seed_spread(own: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> Spread:
    """The spread of the seeds of settings that are compared.

    own: the values of their runs. others: those of other settings, which count as well, unless the compared ones vary
    significantly more (F test, 5 %). Then only these count.
    """
    from scipy.special import fdtri

    alone, rest = pooled(own), pooled(others)
    if alone.df and rest.df and alone.variance > rest.variance * float(fdtri(alone.df, rest.df, 1 - SIGNIFICANT)):
        return alone
    return pooled([*own, *others])


def text_noise(
    a: Values, b: Values, weights: Values, *, level: float = LEVEL, same: Sequence[Values] = ()
) -> TextNoise:
    """The noise of the mean difference over segments, by a bootstrap of blocks of segments.

    a, b: losses (runs, segments). weights: (segments,). same: losses of further runs, (runs, segments) for each
    setting, for seed_variance. The circular block bootstrap (Politis and Romano, 1992), because neighbours are
    alike, with blocks of the cube root of the number of segments (Hall, Horowitz and Jing, 1995,
    https://doi.org/10.1093/biomet/82.3.561), and percentile intervals.
    """
    means = _resampled_means(b.mean(axis=0) - a.mean(axis=0), weights)
    low, high = np.quantile(means, [level / 2, 1 - level / 2])
    pairs = [(one[i], one[i + 1]) for one in (a, b, *same) for i in range(len(one) - 1)]
    seed_variances = [_resampled_means(second - first, weights).var() / 2 for first, second in pairs]
    return TextNoise(
        float(means.var()),
        float(low),
        float(high),
        float(np.mean(seed_variances)) if seed_variances else None,
    )


def difference(
    a: Sequence[float], b: Sequence[float], spread: Spread, text: TextNoise = NO_TEXT, *, level: float = LEVEL
) -> Difference:
    """The difference of two settings, from the value of each of their runs.

    A t interval with the variance of both means over seeds, and of the text. Its degrees of freedom are those of
    `spread`: those of the sum (Satterthwaite, 1946) are more where few seeds happen to be close to each other, and
    called 6 of 100 equal settings different. The variance over seeds is taken to be that of `spread` in both.
    level: of both tails together.
    """
    return _difference(float(np.mean(b) - np.mean(a)), (len(a), len(b)), (len(a), len(b)), spread, text, level)


def paired_difference(
    a: Sequence[float], b: Sequence[float], text: TextNoise = NO_TEXT, *, level: float = LEVEL
) -> Difference:
    """The same of runs in pairs with one seed: what a seed changes in both alike is no noise of their difference."""
    changes = np.array(b) - np.array(a)
    return _difference(
        float(changes.mean()), (len(changes),), (len(a), len(b)), pooled([changes.tolist()]), text, level
    )


def _difference(
    value: float, counts: Sequence[int], models: Sequence[int], spread: Spread, text: TextNoise, level: float
) -> Difference:
    """counts: of the values that have the variance of `spread`, in each mean. models: of each setting."""
    if not spread.df:
        return Difference(value, None, None, None)
    # without two runs of a setting, all the noise of the text is taken to be of the models, not of the settings
    of_seeds = text.variance
    if text.seed_variance is not None:
        of_seeds = min(text.variance, _shares(models) * text.seed_variance)

    def error(more: int, power: float = 0.5) -> float:
        """Half the interval after more seeds; with a power over 0.5, the least difference that has it."""
        rest = _shares([count + more for count in counts])
        variance = spread.variance * rest + text.variance - of_seeds * (1 - rest / _shares(counts))
        df = spread.df + len(counts) * more
        return (_quantile(df, 1 - level / 2) + _quantile(df, power)) * math.sqrt(max(0.0, variance))

    found = Difference(value, value - error(0), value + error(0), None)
    if found.sign:
        return found
    enough = (more for more in range(1, MAX_MORE_SEEDS + 1) if error(more, POWER) < abs(value))
    return Difference(value, found.low, found.high, next(enough, None))


def _shares(counts: Sequence[int]) -> float:
    return sum(1 / count for count in counts)


def block_length(segments: int) -> int:
    """Segments in a block of the bootstrap."""
    return max(1, round(math.cbrt(segments)))


def _quantile(df: float, probability: float) -> float:
    """Of Student's t distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(df, probability))


def _resampled_means(values: Values, weights: Values) -> Values:
    """The weighted mean of each resample that has a weight: (up to RESAMPLES,)."""
    drawn = _draws(len(values))
    totals = drawn @ weights
    means: Values = (drawn @ (values * weights))[totals > 0] / totals[totals > 0]
    return means


@cache
def _draws(segments: int) -> Values:
    """How often each resample has each segment: (RESAMPLES, segments)."""
    length = block_length(segments)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    starts = generator.integers(segments, size=(RESAMPLES, -(-segments // length)))
    drawn = (starts[:, :, None] + np.arange(length)).reshape(RESAMPLES, -1)[:, :segments] % segments
    counts = np.zeros((RESAMPLES, segments))
    np.add.at(counts, (np.arange(RESAMPLES)[:, None], drawn), 1)
    return counts
