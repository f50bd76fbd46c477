import json
from types import SimpleNamespace

import pytest

from experiments.sweeping import watch
from experiments.sweeping.watch import Watch


class PrunedTrial:
    """A trial that Optuna prunes at its first evaluation."""

    def __init__(self):
        self.reported = {}

    def report(self, value, step):
        self.reported[step] = value

    def should_prune(self):
        return True


@pytest.fixture
def pruned(tmp_path, monkeypatch):
    """A watch, and a function that adds an evaluation to the history that it follows."""
    monkeypatch.setattr(watch, "stop_stage", lambda folder: True)
    followed = Watch(SimpleNamespace(), PrunedTrial())
    followed.folder = tmp_path

    def evaluate(step, loss):
        with (tmp_path / watch.HISTORY_FILE).open("a") as file:
            file.write(json.dumps({"step": step, "val_loss": loss}) + "\n")

    return followed, evaluate


def test_a_pruned_training_is_looked_at_once_more_when_it_has_ended(pruned):
    followed, evaluate = pruned
    evaluate(10, 5.0)
    followed.look()
    assert followed.is_pruned
    evaluate(20, 4.0)  # before the signal arrives
    followed.look()
    assert followed.trial.reported == {10: 5.0}
    followed.look(final=True)
    assert followed.trial.reported == {10: 5.0, 20: 4.0}
    assert (followed.seen_step, followed.last_loss) == (20, 4.0)
