"""Search spaces: their grids, samples and Optuna's distributions agree."""

import random

from experiments.sweeping.space import Choices, Range, grid, grid_size, with_values


def test_a_grid_has_all_combinations():
    space = {"train.seed": Range(1, 3, False, None), "train.schedule": Choices(("linear", "cosine"))}
    combinations = list(grid(space))
    assert len(combinations) == grid_size(space) == 6
    assert combinations[0] == {"train.seed": 1, "train.schedule": "linear"}


def test_steps_of_a_grid_are_round_and_reach_the_end():
    assert Range(0.1, 0.4, False, 0.1).grid() == (0.1, 0.2, 0.3, 0.4)
    assert Range(0, 100, False, 30).grid() == (0, 30, 60, 90)
    assert Range(0.1, 0.4, False, None).grid() is None
    assert Range(1, 100, True, None).grid() is None


def test_samples_lie_in_what_optuna_draws_from():
    generator = random.Random(0)
    for param in (
        Range(1e-4, 1e-1, True, None),
        Range(0.1, 0.4, False, 0.1),
        Range(1, 64, True, None),
        Range(2, 9, False, None),
    ):
        distribution = param.distribution()
        for _ in range(50):
            value = param.sample(generator)
            assert distribution._contains(distribution.to_internal_repr(value))
            assert isinstance(value, int) == param.is_integer


def test_other_values_leave_the_base_alone():
    base = {"train": {"seed": 1, "beta1": 0.9}}
    assert with_values(base, {"train.seed": 2, "model.n_head": 3}) == {
        "train": {"seed": 2, "beta1": 0.9},
        "model": {"n_head": 3},
    }
    assert base == {"train": {"seed": 1, "beta1": 0.9}}
