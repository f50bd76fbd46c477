import numpy as np
import pytest
from scipy import stats

from experiments.statistics import (
    NO_TEXT,
    Spread,
    block_length,
    difference,
    paired_difference,
    pooled,
    seed_spread,
    text_noise,
)


def test_the_pooled_variance_is_that_within_groups():
    spread = pooled([[1.0, 3.0], [10.0, 11.0, 12.0], [99.0]])
    assert spread == Spread(pytest.approx((2 + 2) / 3), 5, 2)
    assert spread.df == 3
    assert pooled([[1.0], []]).df == 0


def test_without_noise_of_the_text_the_interval_is_students():
    generator = np.random.default_rng(0)
    a, b = generator.normal(0, 1, 4), generator.normal(1, 1, 6)
    found = difference(a, b, pooled([a, b]), level=0.05)
    theirs = stats.ttest_ind(b, a).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert found.value == pytest.approx(b.mean() - a.mean())


def test_pairs_have_the_interval_of_the_paired_t_test():
    generator = np.random.default_rng(0)
    a = generator.normal(0, 1, 5)
    b = a + generator.normal(0.2, 0.1, 5)
    found = paired_difference(a, b, level=0.05)
    theirs = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert found.sign == 1
    assert difference(a, b, pooled([a, b])).sign == 0
    # 15 pairs for 0.8 standard deviations of the difference (Cohen, 1988, table 2.3.5, for one sample)
    assert 11 <= paired_difference([0.0, 0.0, 0.0], [0.8 - 1, 0.8, 0.8 + 1], level=0.05).more_seeds <= 13


def test_the_spread_of_other_settings_counts_unless_the_compared_ones_vary_more():
    calm = [[0.0, 0.01, -0.01], [5.0, 5.01, 4.99]]
    assert seed_spread([[1.0], [2.0]], calm) == Spread(pytest.approx(1e-4), 6, 2)
    assert seed_spread([[1.0, 1.01], [2.0, 2.01]], calm).groups == 4
    assert seed_spread([[1.0, 1.5], [2.0, 2.5]], calm) == Spread(pytest.approx(0.125), 4, 2)
    assert seed_spread([[1.0, 1.5], [2.0, 2.5]], []).df == 2


def test_one_seed_each_without_a_known_spread_has_no_interval():
    found = difference([1.0], [2.0], pooled([]))
    assert (found.value, found.low, found.high, found.more_seeds, found.sign) == (1.0, None, None, None, 0)


@pytest.mark.parametrize(("a", "b"), [([1.0, 1.0], [2.0, 2.0]), ([1.0, 1.0], [1.0, 1.0])])
def test_runs_without_any_spread(a, b):
    found = difference(a, b, pooled([a, b]), level=0.05)
    assert (found.low, found.high) == (found.value, found.value)
    assert found.sign == (b > a)
    assert found.more_seeds is None


def test_more_seeds_are_about_as_many_as_a_power_analysis_says():
    # 0.8 standard deviations: 26 of each for a power of 80 % (Cohen, 1988, table 2.4.1)
    a, b = [-1.0, 1.0], [-0.2, 1.8]
    found = difference(a, b, Spread(1.0, 30, 10), level=0.05)
    assert found.sign == 0
    assert 22 <= found.more_seeds + 2 <= 26
    assert difference(a, [-0.99, 1.01], Spread(1.0, 30, 10)).more_seeds is None  # 80,000 of each


def test_blocks_are_longer_in_a_longer_text():
    assert [block_length(count) for count in (1, 8, 282, 1024)] == [1, 2, 7, 10]


def test_the_noise_of_independent_segments_is_their_standard_error():
    generator = np.random.default_rng(1)
    a, b = generator.normal(4, 1, (1, 600)), generator.normal(4, 1, (1, 600))
    found = text_noise(a, b, np.ones(600), level=0.05)
    assert found.variance == pytest.approx(2 / 600, rel=0.3)
    center = (b - a).mean()
    error = 1.96 * np.sqrt(2 / 600)
    assert (found.low, found.high) == pytest.approx((center - error, center + error), abs=0.35 * error)
    assert found.seed_variance is None


def test_the_noise_of_neighbours_that_are_alike_is_larger():
    values = np.repeat(np.random.default_rng(2).normal(0, 1, 100), 6)[None]
    alike = text_noise(np.zeros((1, 600)), values, np.ones(600)).variance
    shuffled = np.random.default_rng(3).permutation(values[0])[None]
    assert alike > 3 * text_noise(np.zeros((1, 600)), shuffled, np.ones(600)).variance


def test_segments_count_by_their_weight():
    a, b = np.zeros((1, 3)), np.array([[1.0, 1.0, 100.0]])
    found = text_noise(a, b, np.array([128.0, 128.0, 0.0]))
    assert (found.low, found.high) == (1, 1)


def test_the_part_of_the_seeds_comes_from_runs_of_one_setting():
    generator = np.random.default_rng(4)
    runs = generator.normal(0, 1, (5, 500))
    found = text_noise(runs[:1], runs[1:2], np.ones(500), same=[runs[2:]])
    assert found.seed_variance == pytest.approx(1 / 500, rel=0.3)
    assert text_noise(runs[:2], runs[2:], np.ones(500)).seed_variance == pytest.approx(1 / 500, rel=0.3)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_at_most_one_in_twenty_pairs_without_a_difference_is_called_different(seeds):
    """Simulated runs: noise of the seed, and noise of the seed in each segment."""
    generator = np.random.default_rng(seeds)

    def runs(count):
        return generator.normal(0, 0.01, (count, 1)) + generator.normal(0, 0.06, (count, 100))

    wrong = 0
    for _ in range(300):
        a, b, other = runs(seeds), runs(seeds), runs(4)
        spread = seed_spread([a.mean(axis=1), b.mean(axis=1)], [other.mean(axis=1)])
        wrong += difference(a.mean(axis=1), b.mean(axis=1), spread, text_noise(a, b, np.ones(100))).sign != 0
    assert wrong <= 15


def test_a_clear_difference_is_found():
    generator = np.random.default_rng(5)
    found = 0
    for _ in range(100):
        a, b = generator.normal(4.7, 0.01, 3), generator.normal(4.66, 0.01, 3)
        found += difference(a, b, pooled([a, b]), NO_TEXT).sign == -1
    assert found >= 90
