import copy
import io
import math

import pytest
import torch

from gpt2.compute import Compute
from gpt2.data import Sampler, open_tokens
from gpt2.errors import DivergedError
from gpt2.evaluation import validation_loss
from gpt2.model import GPT
from gpt2.optim import Optimizer, lr_at
from gpt2.trainer import TrainState, checkpoint_content, restore, train
from tests.conftest import TINY, needs_compiler


class Recorder:
    """Hooks that remember what they heard, and stop after a step if told to."""

    def __init__(self, stop_after=None):
        self.rows, self.saved, self.steps, self.warnings, self.stop_after = [], [], [], [], stop_after

    def log(self, row):
        self.rows.append(row)

    def progress(self, state, loss, tokens_per_s):
        self.steps.append(state.step)

    def save(self, state):
        self.saved.append(state.step)

    def warn(self, message):
        self.warnings.append(message)

    def should_stop(self):
        return self.stop_after is not None and bool(self.steps) and self.steps[-1] >= self.stop_after


class Run:
    """A small training run."""

    def __init__(self, tokens, config, precision=torch.float32, **options):
        torch.manual_seed(config.seed)
        self.config, self.tokens = config, tokens
        self.model = GPT(TINY)
        self.compute = Compute(self.model, precision, **options)
        self.optimizer = Optimizer(self.model, config)
        self.state = TrainState.begin(precision, config.batch_size)

    def go(self, hooks, log_interval=1, **options):
        config = self.config
        sampler = Sampler(open_tokens(self.tokens, "train"), config)
        validation = open_tokens(self.tokens, "val")[:200]
        return train(
            self.compute,
            self.optimizer,
            sampler,
            lambda batch_size, progress: validation_loss(
                self.compute, validation, sequence_length=16, batch_size=batch_size, progress=progress
            ),
            config,
            self.state,
            hooks,
            log_interval=log_interval,
            **options,
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
    run, hooks = Run(tokens, train_config(max_steps=7, eval_interval=3)), Recorder()
    run.go(hooks, log_interval=2, checkpoint_interval=5)
    assert hooks.steps == [1, 2, 3, 4, 5, 6, 7]
    assert [row["step"] for row in hooks.rows] == [2, 3, 4, 6, 7]
    assert [row["step"] for row in hooks.rows if row["val_loss"] is not None] == [3, 6, 7]  # the last step always
    assert hooks.saved == [5, 7]  # the interval, the end
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


# The first losses of TINY on our text, in plain fp32; a change that is not meant to change numbers keeps them.
GOLDEN_LOSSES = {
    "adamw": [10.8035, 10.74836, 10.61715, 10.39738, 10.16737, 9.94699, 9.75452, 9.6486, 9.52162, 9.47794],
    "muon": [10.8035, 10.75476, 10.62205, 10.3955, 10.16723, 9.94373, 9.74557, 9.64114, 9.52515, 9.48433],
}


@pytest.mark.parametrize("optimizer", GOLDEN_LOSSES)
def test_the_first_losses_are_what_they_were(tokens, train_config, optimizer):
    run, hooks = Run(tokens, train_config(max_steps=10, optimizer=optimizer)), Recorder()
    run.go(hooks)
    assert [row["train_loss"] for row in hooks.rows] == pytest.approx(GOLDEN_LOSSES[optimizer], abs=2e-4)


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_narrow_formats_learn_as_fp32_does(tokens, train_config, precision, tolerance):
    config = train_config(max_steps=30, eval_interval=30)
    wide, narrow = Run(tokens, config), Run(tokens, config, precision)
    wide.go(Recorder())
    narrow.go(Recorder())
    assert narrow.state.best_val_loss == pytest.approx(wide.state.best_val_loss, abs=tolerance)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_of_run_resumes_exactly(tokens, train_config, optimizer, precision):
    config = train_config(optimizer=optimizer, schedule="wsd", label_smoothing=0.1)
    whole, parts = Run(tokens, config, precision), Run(tokens, config, precision)
    whole.go(Recorder())
    assert not parts.go(Recorder(stop_after=3))
    file = io.BytesIO()
    torch.save(checkpoint_content(parts.model, parts.optimizer, parts.state), file)
    file.seek(0)
    resumed = Run(tokens, config, precision)
    resumed.state = restore(torch.load(file, weights_only=True), resumed.model, resumed.optimizer)
    assert resumed.go(Recorder())
    assert torch.equal(resumed.weights(), whole.weights())


@needs_compiler
def test_a_compiled_run_resumes_exactly(tokens, train_config):
    def compiled_run():
        run = Run(tokens, train_config(max_steps=4), torch.bfloat16)
        run.compute.compile(*torch.zeros(2, 4, 16, dtype=torch.long))
        return run

    whole, parts, resumed = compiled_run(), compiled_run(), compiled_run()
    whole.go(Recorder())
    parts.go(Recorder(stop_after=2))
    content = copy.deepcopy(checkpoint_content(parts.model, parts.optimizer, parts.state))
    resumed.state = restore(content, resumed.model, resumed.optimizer)
    assert resumed.go(Recorder())
    assert torch.equal(resumed.weights(), whole.weights())


def test_gradients_that_overflow_in_float16_lower_the_scale_and_change_nothing(tokens, train_config):
    run, hooks = Run(tokens, train_config(max_steps=3), torch.float16), Recorder(stop_after=1)
    run.state.loss_scale = 2.0**40
    before = run.weights()
    run.go(hooks)
    assert run.state.loss_scale == 2.0**39
    assert torch.equal(run.weights(), before)
    assert hooks.rows[0]["grad_norm"] is None
    assert math.isfinite(hooks.rows[0]["train_loss"])


def test_a_float16_run_that_no_scale_can_save_is_divergence(tokens, train_config, monkeypatch):
    run = Run(tokens, train_config(max_steps=100), torch.float16)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(DivergedError, match="at step 27"):  # from 2^16 down to 2^-10
        run.go(Recorder())


def test_utilisation_is_the_speed_in_flops_over_the_peak(tokens, train_config):
    run, hooks = Run(tokens, train_config()), Recorder()
    run.go(hooks, peak_flops=1e12)
    row = hooks.rows[-1]
    assert row["mfu"] == pytest.approx(row["tokens_per_s"] * TINY.flops_per_token(16) / 1e12)
    assert row["peak_memory_bytes"] > 1e7
    assert run.state.elapsed_s > run.state.data_s + run.state.log_s > 0


def test_an_error_while_reading_batches_is_raised(tokens, train_config, monkeypatch):
    def fail(self, step, micro_step):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Sampler, "batch", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        Run(tokens, train_config()).go(Recorder())
