"""Early stopping, and the loss on a sample of the training text at the end of a run."""

import copy
import math

import numpy as np
import pytest
import torch

from gpt2.data.token_files import open_tokens
from gpt2.training.state import TrainState, checkpoint_content, restore_checkpoint
from gpt2.training.validation import sample_loss
from tests.gpt2.training.small_run import Recorder, Run


class Scripted(Run):
    """A run whose validation losses are given, and whose last evaluation also scores the training text."""

    def __init__(self, tokens, config, losses):
        super().__init__(tokens, config)
        self.losses, self.scored = losses, []

    def go(self, callbacks, **options):
        def validate(batch_size, progress):
            progress(0)
            return self.losses[self.state.step // self.config.eval_interval - 1]

        def score(batch_size, progress):
            progress(0)
            self.scored.append(self.state.step)
            return 2.5

        return super().go(callbacks, validate=validate, score_training_text=score, **options)


@pytest.mark.parametrize(
    ("losses", "patience", "last_step", "best_step"),
    [
        ((5, 4, 4, 4.5, 1, 1), 2, 8, 4),  # equal is not better
        ((5, 4, 4.5, 3, 3.5, 3.6), 2, 12, 8),  # a better one starts the count again
        ((5, 4, 4.5, 3, 3.5, 3.6), 1, 6, 4),
        ((math.nan, math.nan, 4, 4, 4, 4), 2, 4, 0),
        ((5, 6, 6, 6, 6, 4), None, 12, 12),
    ],
)
def test_the_run_ends_after_evaluations_without_a_better_loss(
    tokens, train_config, losses, patience, last_step, best_step
):
    run = Scripted(
        tokens, train_config(max_steps=12, eval_interval=2, patience=patience, gradient_accumulation_steps=1), losses
    )
    callbacks = Recorder()
    assert run.go(callbacks)
    assert (run.state.step, run.state.best_step) == (last_step, best_step)
    assert callbacks.saved[-1] == last_step
    assert run.state.is_complete(run.config)
    assert run.scored == [last_step]
    assert run.state.train_sample_loss == 2.5
    assert run.go(Recorder())  # a complete run trains no more
    assert (run.state.step, run.scored) == (last_step, [last_step])


class StopsAt(Recorder):
    """Stops the run at call number `call` of should_stop."""

    def __init__(self, call):
        super().__init__()
        self.left = call

    def should_stop(self):
        self.left -= 1
        return self.left < 0


def test_a_stop_before_in_and_after_the_last_evaluation_changes_no_byte(tokens, train_config):
    config = train_config(max_steps=6, eval_interval=1, patience=2, gradient_accumulation_steps=1)
    losses = (5, 4, 4.5, 4.5, 1, 1)
    whole = Scripted(tokens, config, losses)
    whole.go(Recorder())
    stopped_at = []
    for call in range(100):
        first, second = Scripted(tokens, config, losses), Scripted(tokens, config, losses)
        if first.go(StopsAt(call)):
            break
        stopped_at.append((first.state.step, first.state.pending_row is not None))
        content = copy.deepcopy(checkpoint_content(first.model, first.optimizer, first.state))
        second.state = restore_checkpoint(content, second.model, second.optimizer)
        assert second.go(Recorder())
        assert torch.equal(second.weights(), whole.weights())
        assert (second.state.step, second.state.best_step) == (4, 2)
        assert second.state.train_sample_loss == 2.5
        assert all(torch.equal(w, whole.state.best_weights[n]) for n, w in second.state.best_weights.items())
    assert stopped_at.count((4, True)) == 2  # in the evaluation, and in that of the training text


def test_a_run_that_waits_for_an_evaluation_is_not_complete(train_config):
    state, config = TrainState.initial(torch.float32, 4), train_config(max_steps=6, eval_interval=3)
    state.step, state.pending_row = 6, {"step": 6}
    assert not state.is_complete(config)
    state.pending_row = None
    assert state.is_complete(config)


def test_the_sample_of_the_training_text_is_scored_like_the_validation_text(tokens, train_config):
    run = Run(tokens, train_config(dropout=0.3))
    text = open_tokens(tokens, "train")[:]
    windows = [text[start : start + 17].astype("int64") for start in (0, (len(text) - 17) // 2, len(text) - 17)]
    pairs = torch.from_numpy(np.stack(windows))
    with torch.no_grad():
        expected = run.model(pairs[:, :-1], pairs[:, 1:])[1].item()
    found = sample_loss(run.compute, text, 3 * 16, sequence_length=16, batch_size=2)
    assert found == pytest.approx(expected, rel=1e-6)
