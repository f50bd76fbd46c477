import pytest

from experiments.runs import experiments, find_run
from experiments.settings import BITS, LOSS, MEMORY, SPEED, check_comparable, group, with_same_text
from gpt2.errors import UserError
from tests.experiments.repository import Repository


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path / "repository")


def names(settings):
    return [[run.name for run in setting.runs] for setting in settings]


def test_runs_that_differ_only_in_their_seed_are_one_setting(repository):
    repository.experiment("a", [5.0], train__seed=1)
    repository.experiment("b", [5.1], train__seed=2, evaluate__max_new_tokens=5, runtime__threads=1)
    repository.experiment("c", [5.2], train__seed=2, train__learning_rate=1.0e-3)
    repository.experiment("d", [5.3], train__seed=3, code="b1")
    repository.experiment("e", [5.4], train__seed=4, text="text two")
    repository.experiment("f", [5.5], train__seed=1)  # the same again, perhaps on another machine
    assert names(group(experiments(repository.folder)).values()) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_without_dvcs_lock_runs_of_one_commit_are_of_one_code(repository):
    repository.evaluate([5.0])
    workspace = find_run("workspace", repository.folder)
    assert names(group([workspace, find_run("main", repository.folder)]).values()) == [["workspace"], ["main"]]
    assert names(group([workspace, workspace]).values()) == [["workspace"]]


def test_values_of_a_setting(repository):
    repository.experiment("a", [5.0, 4.0], train__seed=1)
    repository.experiment("b", [6.0, 4.0], train__seed=2, train={"tokens_per_s": 5000})
    (setting,) = group(experiments(repository.folder)).values()
    assert setting.name == "a, b"
    assert setting.values(LOSS) == [4.5, 5.0]
    assert setting.values(BITS) == pytest.approx([value / 0.6931472 / 3 for value in (4.5, 5.0)], abs=1e-5)
    assert setting.values(SPEED) == [4000, 5000]
    assert setting.values(MEMORY) == []  # one run did not write it
    assert setting.segments(LOSS).tolist() == [[5.0, 4.0], [6.0, 4.0]]


def test_different_held_out_texts_are_not_comparable(repository):
    repository.experiment("a", [5.0, 4.0], train__seed=1)
    repository.experiment("b", [5.0, 4.0], train__seed=2, text="text two")
    repository.experiment("c", [5.0], train__seed=2)
    repository.experiment("d", train__seed=3)
    a, b, c, d = experiments(repository.folder)
    check_comparable([a, a])
    for other in (b, c):
        with pytest.raises(UserError, match=f"a and {other.name} have different held-out texts"):
            check_comparable([a, other])
    with pytest.raises(
        UserError, match=r"d has no readable reports/evaluate/segment_losses\.json: it was not evaluated"
    ):
        check_comparable([a, d])


def test_only_runs_with_the_same_text_say_how_seeds_vary(repository):
    for seed in (1, 2, 3):
        repository.experiment(f"a-{seed}", [5.0], train__seed=seed)
        repository.experiment(f"b-{seed}", [5.0], train__seed=seed, train__learning_rate=1.0e-3, text="text two")
    repository.experiment("c", [5.0], train__learning_rate=2.0e-3)
    repository.experiment("a-4", train__seed=4)  # failed
    runs = experiments(repository.folder)
    assert names(with_same_text(group(runs).values(), find_run("c", repository.folder))) == [["a-1", "a-2", "a-3"]]
