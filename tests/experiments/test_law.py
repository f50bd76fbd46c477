import numpy as np
import pytest

from experiments.scaling.law import Law, Point, fit
from gpt2.errors import UserError

CHINCHILLA = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)
SIZES = (3e6, 7e6, 11e6, 16e6, 30e6)
LENGTHS = (0.5e6, 1e6, 2e6)


def runs(law, noise=0.0, seed=0, sizes=SIZES):
    draw = np.random.default_rng(seed)
    return [
        Point(int(n), int(d), law.loss(n, d) * float(np.exp(noise * draw.standard_normal())))
        for n in sizes
        for d in LENGTHS
    ]


def test_a_law_is_found_in_runs_that_follow_it():
    found = fit(runs(CHINCHILLA)).law
    for n in (1e6, 3e6, 30e6, 124e6):
        for d in (0.5e6, 2e6, 65e6):
            assert found.loss(n, d) == pytest.approx(CHINCHILLA.loss(n, d), rel=0.01)


def test_intervals_are_wider_further_away_and_hold_the_truth():
    inside = 0
    for seed in range(12):
        found = fit(runs(CHINCHILLA, noise=3e-3, seed=seed))
        near, far = found.predict(30e6, 2e6), found.predict(124e6, 65e6)
        assert near.low < near.value < near.high
        assert far.high - far.low > near.high - near.low
        inside += CHINCHILLA.loss(124e6, 65e6) in far
    assert inside >= 10


def test_a_size_that_was_left_out_is_predicted():
    noisy = runs(CHINCHILLA, noise=3e-3, seed=3)
    kept = [point for point in noisy if point.parameters < 30e6]
    found = fit(kept)
    assert all(point.loss in found.predict(point.parameters, point.tokens) for point in noisy if point not in kept)


@pytest.mark.parametrize("points", [[], runs(CHINCHILLA)[:5], runs(CHINCHILLA, sizes=SIZES[:2])])
def test_too_few_runs_are_an_error(points):
    with pytest.raises(UserError, match="a scaling law needs 6 runs of three sizes and two lengths; there are"):
        fit(points)


def test_the_same_runs_give_the_same_fit():
    points = runs(CHINCHILLA, noise=3e-3)
    assert fit(points) == fit(points)
