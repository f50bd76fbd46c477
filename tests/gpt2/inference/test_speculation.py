import random

from hypothesis import given
from hypothesis import strategies as st

from gpt2.inference.speculation import MAX_DRAFT, NGRAMS, Drafter, measure_steps

CHEAP = [1.0] * (MAX_DRAFT + 1)
DEAR = [float(tokens) for tokens in range(1, MAX_DRAFT + 2)]


def test_a_draft_is_what_followed_the_last_tokens_before():
    assert Drafter().propose([1, 2, 3, 4, 5, 6, 1, 2, 3], 3, CHEAP) == [4, 5, 6]
    assert Drafter().propose([1, 2, 3, 4, 5, 6, 1, 2, 3], 2, CHEAP) == [4, 5]


def test_the_longest_match_counts_and_then_the_latest():
    assert Drafter().propose([1, 2, 3, 9, 2, 3, 8, 7, 2, 3, 5, 1, 2, 3], 1, CHEAP) == [9]
    assert Drafter().propose([2, 3, 9, 7, 2, 3, 8, 7, 7, 2, 3], 1, CHEAP) == [8]


def test_without_a_match_there_is_no_draft():
    assert Drafter().propose([1, 2, 3, 4], 5, CHEAP) == []
    assert Drafter().propose([1], 5, CHEAP) == []
    assert Drafter().propose([], 5, CHEAP) == []


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 20))
def test_drafts_are_those_of_a_search_through_the_text(ids, step):
    drafter = Drafter()
    for end in range(0, len(ids), step):  # however the text grows
        drafter.propose(ids[:end], 1, CHEAP)
    found = drafter.propose(ids, MAX_DRAFT, CHEAP)
    expected = []
    for n in NGRAMS:
        starts = [i for i in range(len(ids) - n) if ids[i : i + n] == ids[len(ids) - n :]]
        if starts and len(ids) > n:
            expected = ids[starts[-1] + n :][:MAX_DRAFT]
            break
    assert found == expected[: len(found)]
    assert bool(found) == bool(expected)


def test_there_are_no_drafts_where_they_cost_what_they_save():
    ids = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    assert Drafter().propose(ids, 3, DEAR) == []
    assert Drafter().propose(ids, 3, [1.0]) == []
    assert Drafter().propose(ids, 3, []) == []


def test_drafts_become_rare_after_wrong_ones_and_long_after_right_ones():
    ids, seconds = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3], [1 + 0.15 * extra for extra in range(MAX_DRAFT + 1)]
    drafter = Drafter()
    first = len(drafter.propose(ids, 7, seconds))
    for _ in range(60):
        drafter.record(3, 3)
    assert len(drafter.propose(ids, 7, seconds)) > first
    for _ in range(200):
        drafter.record(3, 0)
    assert drafter.propose(ids, 7, seconds) == []


def test_the_rate_follows_the_share_of_right_tokens():
    rng, drafter = random.Random(0), Drafter()
    for _ in range(3000):
        right = 0
        while right < 4 and rng.random() < 0.6:
            right += 1
        drafter.record(4, right)
    assert abs(drafter._accepted / drafter._trials - 0.6) < 0.15


def test_steps_are_measured_for_each_number_of_tokens():
    counts = []
    assert len(measure_steps(counts.append, 100)) == MAX_DRAFT + 1
    assert set(counts) == set(range(1, MAX_DRAFT + 2))
    assert len(measure_steps(counts.append, 3)) == 3
