"""The scaling law L(N, D) = E + A / N^alpha + B / D^beta of Hoffmann et al., 2022 (https://arxiv.org/abs/2203.15556).

N: parameters. D: tokens of training. L: validation loss in nats per token. Given the exponents, the law is linear in
E, A and B; so the exponents are searched on a grid, and the rest is least squares (variable projection, Golub and
Pereyra, 1973). Intervals are those of a bootstrap: refits to the law with noise like that of the runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpt2.errors import UserError

Floats = npt.NDArray[np.float64]
MIN_POINTS = 6
"""One more than the law has parameters, FITTED."""
MIN_NOISE = 2e-3
"""Smallest standard deviation of the relative error of a loss: that of runs that differ in their seed."""
FITTED = 5
DRAWS = 300
LEVEL = 0.95
EXPONENTS = np.geomspace(0.04, 1.2, 60)


@dataclass(frozen=True)
class Point:
    """A run. loss: its validation loss at the end of its schedule, in nats per token."""

    parameters: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class Interval:
    """A prediction, and its 95 % interval."""

    value: float
    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, float) and self.low <= value <= self.high


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """The loss in nats per token."""
        return float(self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta)


@dataclass(frozen=True)
class Fit:
    """A law fitted to runs, and refits to what the same law would have given with other noise.

    noise: standard deviation of a loss, relative.
    """

    law: Law
    noise: float
    refits: tuple[Law, ...]

    def predict(self, parameters: float, tokens: float) -> Interval:
        """The loss of a run with these, which has noise of its own."""
        draw = np.random.default_rng(0)
        losses = np.array([law.loss(parameters, tokens) for law in self.refits])
        losses *= 1 + self.noise * draw.standard_normal(len(losses))
        low, high = np.quantile(losses, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(self.law.loss(parameters, tokens), float(low), float(high))


def fit(points: Sequence[Point], *, draws: int = DRAWS) -> Fit:
    """Fits the law to at least MIN_POINTS runs, of at least three sizes and two lengths. Raises UserError for fewer."""
    sizes, lengths = {point.parameters for point in points}, {point.tokens for point in points}
    if len(points) < MIN_POINTS or len(sizes) < 3 or len(lengths) < 2:
        raise UserError(
            f"a scaling law needs {MIN_POINTS} runs of three sizes and two lengths; there are {len(points)} of "
            f"{len(sizes)} and {len(lengths)}"
        )
    n, d, losses = (
        np.array([getattr(point, name) for point in points], float) for name in ("parameters", "tokens", "loss")
    )
    search = _Search(n, d, losses)
    (law,) = search.best(losses[:, None])
    fitted = np.array([law.loss(*each) for each in zip(n, d, strict=True)])
    # residuals of a fit are smaller than the noise, by the parameters that were fitted to them
    freedom = max(1, len(points) - FITTED)
    noise = max(MIN_NOISE, float(np.sqrt((((losses - fitted) / losses) ** 2).sum() / freedom)))
    draw = np.random.default_rng(0)
    noisy = fitted[:, None] * (1 + noise * draw.standard_normal((len(points), draws)))
    return Fit(law, noise, tuple(search.best(noisy)))


class _Search:
    """Least squares of the relative errors of some runs, for every pair of exponents on the grid."""

    def __init__(self, n: Floats, d: Floats, losses: Floats) -> None:
        self.alpha, self.beta = (each.ravel() for each in np.meshgrid(EXPONENTS, EXPONENTS))
        # near 1, so that the three columns are of one size
        self.n_unit, self.d_unit = (float(np.exp(np.log(each).mean())) for each in (n, d))
        of_n = (n / self.n_unit) ** -self.alpha[:, None]
        of_d = (d / self.d_unit) ** -self.beta[:, None]
        columns = np.stack([np.ones_like(of_n), of_n, of_d], axis=2) / losses[None, :, None]  # (pairs, runs, 3)
        self.losses = losses
        # with E, and with E = 0, which is best where it would be negative
        self.designs = [(columns, np.linalg.pinv(columns)), (columns[:, :, 1:], np.linalg.pinv(columns[:, :, 1:]))]

    def best(self, losses: Floats) -> list[Law]:
        """The best law with no negative term, for each column of losses, (runs, draws)."""
        targets = losses / self.losses[:, None]
        found = []
        for columns, inverse in self.designs:
            terms = inverse @ targets  # (pairs, 3 or 2, draws)
            errors = ((columns @ terms - targets) ** 2).sum(axis=1)  # (pairs, draws)
            errors[(terms < 0).any(axis=1)] = np.inf
            pairs = errors.argmin(axis=0)
            found.append([(errors[pair, k], pair, terms[pair, :, k].tolist()) for k, pair in enumerate(pairs)])
        return [self._law(*min(each, key=lambda fit: fit[0])[1:]) for each in zip(*found, strict=True)]

    def _law(self, pair: int, terms: list[float]) -> Law:
        *constant, a, b = terms
        alpha, beta = float(self.alpha[pair]), float(self.beta[pair])
        return Law(sum(constant), a * self.n_unit**alpha, alpha, b * self.d_unit**beta, beta)
