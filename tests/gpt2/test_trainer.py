import copy
import io
import math

import pytest
import torch

from gpt2.data import Sampler, open_tokens
from gpt2.errors import DivergedError
from gpt2.evaluation import validation_loss
from gpt2.model import GPT
from gpt2.optim import adamw, lr_at
from gpt2.trainer import TrainState, checkpoint_content, restore, train
from tests.conftest import TINY


class Recorder:
    """Hooks that remember what they heard, and stop after a step if told to."""

    def __init__(self, stop_after=None):
        self.rows, self.saved, self.steps, self.stop_after = [], [], [], stop_after

    def log(self, row):
        self.rows.append(row)

    def progress(self, state, loss, tokens_per_s):
        self.steps.append(state.step)

    def save(self, state):
        self.saved.append(state.step)

    def should_stop(self):
        return self.stop_after is not None and self.steps[-1] >= self.stop_after


class Run:
    """A small training run."""

    def __init__(self, tokens, config):
        torch.manual_seed(config.seed)
        self.config, self.tokens = config, tokens
        self.model = GPT(TINY)
        self.optimizer = adamw(self.model, config)
        self.state = TrainState(precision="float32")

    def go(self, hooks, log_interval=1):
        config = self.config
        sampler = Sampler(
            open_tokens(self.tokens, "train"),
            sequence_length=config.sequence_length,
            batch_size=config.batch_size,
            accumulation_steps=config.accumulation_steps,
            seed=config.seed,
        )
        validation = open_tokens(self.tokens, "val")[:200]
        return train(
            self.model,
            self.optimizer,
            sampler,
            lambda: validation_loss(self.model, validation, sequence_length=16, batch_size=4),
            config,
            self.state,
            hooks,
            log_interval=log_interval,
        )

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def test_training_lowers_the_loss_on_held_out_text(tokens, train_config):
    run, hooks = Run(tokens, train_config(max_steps=30, eval_interval=10)), Recorder()
    assert run.go(hooks)
    losses = [row["val_loss"] for row in hooks.rows if row["val_loss"] is not None]
    assert len(losses) == 3
    assert losses[-1] < losses[0] < math.log(50257)
    assert losses[-1] < 8
    assert run.state.best_val_loss == min(losses)


def test_what_is_logged_and_when(tokens, train_config):
    run, hooks = Run(tokens, train_config(max_steps=7, eval_interval=3, checkpoint_interval=5)), Recorder()
    run.go(hooks, log_interval=2)
    assert hooks.steps == [1, 2, 3, 4, 5, 6, 7]
    assert [row["step"] for row in hooks.rows] == [2, 3, 4, 6, 7]
    assert [row["step"] for row in hooks.rows if row["val_loss"] is not None] == [3, 6, 7]  # the last step always
    assert hooks.saved == [3, 5, 6, 7]  # improvements, the interval, the end
    assert [row["learning_rate"] for row in hooks.rows] == [lr_at(row["step"] - 1, run.config) for row in hooks.rows]
    assert hooks.rows[-1]["tokens"] == 7 * run.config.step_tokens
    assert run.state.history == hooks.rows


def test_the_schedule_counts_optimizer_steps(tokens, train_config):
    few, many = Recorder(), Recorder()
    Run(tokens, train_config(accumulation_steps=1)).go(few)
    Run(tokens, train_config(accumulation_steps=4)).go(many)
    assert [row["learning_rate"] for row in few.rows] == [row["learning_rate"] for row in many.rows]


def test_accumulation_equals_one_large_batch(tokens, train_config):
    runs = [
        Run(
            tokens,
            train_config(batch_size=8 // k, accumulation_steps=k, max_steps=3, warmup_steps=1, learning_rate=1e-3),
        )
        for k in (1, 2, 8)
    ]
    hooks = [Recorder() for _ in runs]
    for run, recorder in zip(runs, hooks, strict=True):
        run.go(recorder)
    for run, recorder in zip(runs[1:], hooks[1:], strict=True):
        for key in ("train_loss", "grad_norm"):
            expected = [row[key] for row in hooks[0].rows]
            assert [row[key] for row in recorder.rows] == pytest.approx(expected, rel=1e-4)
        # Adam divides by the gradient's size, which makes rounding visible where it is near 0
        assert (run.weights() - runs[0].weights()).abs().mean() < 1e-6


def test_a_stopped_run_goes_on_to_the_same_weights(tokens, train_config):
    whole, parts = Run(tokens, train_config()), Run(tokens, train_config())
    whole.go(Recorder())
    first = Recorder(stop_after=4)
    assert not parts.go(first)
    assert first.saved[-1] == 4
    file = io.BytesIO()
    torch.save(checkpoint_content(parts.model, parts.optimizer, parts.state), file)
    file.seek(0)

    resumed = Run(tokens, train_config())
    resumed.state = restore(torch.load(file, weights_only=True), resumed.model, resumed.optimizer)
    second = Recorder()
    assert resumed.go(second)
    assert second.steps == [5, 6]
    assert torch.equal(resumed.weights(), whole.weights())
    assert [row["train_loss"] for row in resumed.state.history] == [row["train_loss"] for row in whole.state.history]
    assert resumed.state.best_val_loss == whole.state.best_val_loss


def test_a_loss_that_is_not_finite_never_reaches_the_weights(tokens, train_config):
    run, hooks = Run(tokens, train_config()), Recorder(stop_after=2)
    run.go(hooks)
    moments = copy.deepcopy(run.optimizer.state_dict()["state"])
    with torch.no_grad():
        run.model.transformer["wpe"].weight[0, 0] = math.nan
    poisoned = run.weights()
    with pytest.raises(DivergedError, match=r"diverged at step 3: loss nan.*as after step 2"):
        run.go(Recorder())
    assert run.state.step == 2
    assert torch.equal(run.weights().nan_to_num(0), poisoned.nan_to_num(0))
    assert str(run.optimizer.state_dict()["state"]) == str(moments)


def test_a_learning_rate_that_is_far_too_high_is_divergence(tokens, train_config):
    run = Run(tokens, train_config(learning_rate=1e20, warmup_steps=0))
    with pytest.raises(DivergedError, match=r"smaller train\.learning_rate"):
        run.go(Recorder())


def test_nan_is_never_the_best(tokens, train_config, monkeypatch):
    run, hooks = Run(tokens, train_config()), Recorder()
    values = iter([math.nan, 5.0])
    monkeypatch.setitem(globals(), "validation_loss", lambda *_, **__: next(values))
    run.go(hooks)
    assert [row["val_loss"] for row in hooks.rows if row["step"] in (3, 6)] == [None, 5.0]
    assert (run.state.best_val_loss, run.state.best_step) == (5.0, 6)


def test_a_checkpoint_holds_what_the_old_project_read(tokens, train_config):
    run = Run(tokens, train_config())
    content = checkpoint_content(run.model, run.optimizer, run.state)
    assert content["config"] == TINY.to_dict()
    assert {"model_state_dict", "optimizer_state_dict"} <= content.keys()
