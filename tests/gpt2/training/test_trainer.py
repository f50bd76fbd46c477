import copy
import io
import math

import pytest
import torch

from gpt2.errors import DivergedError
from gpt2.optimizers.schedule import learning_rate_at
from gpt2.training import mixed_precision
from gpt2.training.state import checkpoint_content, restore_checkpoint
from tests.conftest import TINY, needs_compiler
from tests.gpt2.training import small_run
from tests.gpt2.training.small_run import Recorder, Run


def test_training_lowers_the_loss_on_held_out_text(tokens, train_config):
    run, callbacks = Run(tokens, train_config(max_steps=30, eval_interval=10)), Recorder()
    assert run.go(callbacks)
    losses = [row["val_loss"] for row in callbacks.rows if row["val_loss"] is not None]
    assert len(losses) == 3
    assert losses[-1] < losses[0] < math.log(50257)
    assert losses[-1] < 8
    assert run.state.best_val_loss == min(losses)


def test_what_is_logged_and_when(tokens, train_config):
    run, callbacks = Run(tokens, train_config(max_steps=7, eval_interval=3)), Recorder()
    run.go(callbacks, log_interval=2, checkpoint_interval=5)
    assert callbacks.steps == [1, 2, 3, 4, 5, 6, 7]
    assert [row["step"] for row in callbacks.rows] == [2, 3, 4, 6, 7]
    assert [row["step"] for row in callbacks.rows if row["val_loss"] is not None] == [3, 6, 7]  # the last step always
    assert callbacks.saved == [5, 7]  # the interval, the end
    assert [row["learning_rate"] for row in callbacks.rows] == [
        learning_rate_at(row["step"] - 1, run.config) for row in callbacks.rows
    ]
    assert callbacks.rows[-1]["tokens"] == 7 * run.config.tokens_per_step
    assert run.state.history == callbacks.rows


def test_the_schedule_counts_optimizer_steps(tokens, train_config):
    few, many = Recorder(), Recorder()
    Run(tokens, train_config(gradient_accumulation_steps=1)).go(few)
    Run(tokens, train_config(gradient_accumulation_steps=4)).go(many)
    assert [row["learning_rate"] for row in few.rows] == [row["learning_rate"] for row in many.rows]


def test_a_stopped_run_resumes_to_the_same_weights(tokens, train_config):
    whole, parts = Run(tokens, train_config()), Run(tokens, train_config())
    whole.go(Recorder())
    first = Recorder(stop_after=4)
    assert not parts.go(first)
    assert first.saved[-1] == 4
    file = io.BytesIO()
    torch.save(checkpoint_content(parts.model, parts.optimizer, parts.state), file)
    file.seek(0)

    resumed = Run(tokens, train_config())
    resumed.state = restore_checkpoint(torch.load(file, weights_only=True), resumed.model, resumed.optimizer)
    second = Recorder()
    assert resumed.go(second)
    assert second.steps == [5, 6]
    assert torch.equal(resumed.weights(), whole.weights())
    assert [row["train_loss"] for row in resumed.state.history] == [row["train_loss"] for row in whole.state.history]
    assert resumed.state.best_val_loss == whole.state.best_val_loss


def test_a_loss_that_is_not_finite_never_reaches_the_weights(tokens, train_config):
    run, callbacks = Run(tokens, train_config()), Recorder(stop_after=2)
    run.go(callbacks)
    moments = copy.deepcopy(run.optimizer.state_dict()["state"])
    with torch.no_grad():
        run.model.transformer["wpe"].weight[0, 0] = math.nan
    poisoned = run.weights()
    with pytest.raises(DivergedError, match=r"diverged at step 3: loss nan.*the weights are those after step 2"):
        run.go(Recorder())
    assert run.state.step == 2
    assert torch.equal(run.weights().nan_to_num(0), poisoned.nan_to_num(0))
    assert str(run.optimizer.state_dict()["state"]) == str(moments)


def test_a_learning_rate_that_is_far_too_high_is_divergence(tokens, train_config):
    run = Run(tokens, train_config(learning_rate=1e20, warmup_steps=0))
    with pytest.raises(DivergedError, match=r"smaller train\.learning_rate"):
        run.go(Recorder())


def test_nan_is_never_the_best(tokens, train_config, monkeypatch):
    run, callbacks = Run(tokens, train_config()), Recorder()
    values = iter([math.nan, 5.0])
    monkeypatch.setattr(small_run, "validation_loss", lambda *_, **__: next(values))
    run.go(callbacks)
    assert [row["val_loss"] for row in callbacks.rows if row["step"] in (3, 6)] == [None, 5.0]
    assert (run.state.best_val_loss, run.state.best_step) == (5.0, 6)


# The first losses of TINY on our text, in plain fp32; a change that is not meant to change numbers keeps them.
GOLDEN_LOSSES = {
    "adamw": [10.80251, 10.74484, 10.59029, 10.41158, 10.16471, 9.91745, 9.76718, 9.61518, 9.51068, 9.48783],
    "muon": [10.80251, 10.75028, 10.5951, 10.4087, 10.16166, 9.91728, 9.76447, 9.61141, 9.50761, 9.48504],
}


@pytest.mark.parametrize("optimizer", GOLDEN_LOSSES)
def test_the_first_losses_match_the_golden_values(tokens, train_config, optimizer):
    run, callbacks = Run(tokens, train_config(max_steps=10, optimizer=optimizer)), Recorder()
    run.go(callbacks)
    assert [row["train_loss"] for row in callbacks.rows] == pytest.approx(GOLDEN_LOSSES[optimizer], abs=2e-4)


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_reduced_precision_learns_like_fp32(tokens, train_config, precision, tolerance):
    config = train_config(max_steps=30, eval_interval=30)
    wide, narrow = Run(tokens, config), Run(tokens, config, precision)
    wide.go(Recorder())
    narrow.go(Recorder())
    assert narrow.state.best_val_loss == pytest.approx(wide.state.best_val_loss, abs=tolerance)


@pytest.mark.parametrize(
    "changes", [{"optimizer": "adamw", "label_smoothing": 0.1}, {"optimizer": "muon", "min_token_count": 2}]
)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_of_run_resumes_exactly(tokens, train_config, changes, precision):
    config = train_config(schedule="wsd", **changes)
    whole, parts = Run(tokens, config, precision), Run(tokens, config, precision)
    whole.go(Recorder())
    assert not parts.go(Recorder(stop_after=3))
    file = io.BytesIO()
    torch.save(checkpoint_content(parts.model, parts.optimizer, parts.state), file)
    file.seek(0)
    resumed = Run(tokens, config, precision)
    resumed.state = restore_checkpoint(torch.load(file, weights_only=True), resumed.model, resumed.optimizer)
    assert resumed.go(Recorder())
    assert torch.equal(resumed.weights(), whole.weights())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_frozen_weights_stay_as_they_were_and_take_no_memory(tokens, train_config, optimizer, precision):
    config = train_config(optimizer=optimizer, init_from="elsewhere", freeze_layers=1)
    run = Run(tokens, config, precision)
    before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    run.go(Recorder())
    changed = {name for name, weight in run.model.named_parameters() if not torch.equal(weight, before[name])}
    expected = {name for name in before if ".h.1." in name or ".ln_f." in name}
    assert changed == expected
    assert {name.split(".", 1)[1].rpartition(".")[0] for name in run.optimizer.named_tensors()} == expected
    assert {name for name, weight in run.model.named_parameters() if weight.requires_grad} == expected
    assert sum(before[name].numel() for name in expected) == TINY.num_trained_parameters(1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_with_frozen_blocks_resumes_exactly(tokens, train_config, optimizer):
    config = train_config(optimizer=optimizer, init_from="elsewhere", freeze_layers=1)
    whole, parts = Run(tokens, config, torch.bfloat16), Run(tokens, config, torch.bfloat16)
    whole.go(Recorder())
    assert not parts.go(Recorder(stop_after=3))
    file = io.BytesIO()
    torch.save(checkpoint_content(parts.model, parts.optimizer, parts.state), file)
    file.seek(0)
    resumed = Run(tokens, config, torch.bfloat16)
    with torch.no_grad():  # all weights, also frozen ones, are those of the checkpoint
        resumed.model.transformer["wpe"].weight.zero_()
    resumed.state = restore_checkpoint(torch.load(file, weights_only=True), resumed.model, resumed.optimizer)
    assert resumed.go(Recorder())
    assert torch.equal(resumed.weights(), whole.weights())


@needs_compiler
@pytest.mark.slow
def test_frozen_blocks_compile(tokens, train_config):
    config = train_config(max_steps=4, init_from="elsewhere", freeze_layers=1)
    plain, compiled = Run(tokens, config), Run(tokens, config)
    compiled.compute.compile(4, 16)
    for run in (plain, compiled):
        run.go(Recorder())
    expected = [row["train_loss"] for row in plain.state.history]
    assert [row["train_loss"] for row in compiled.state.history] == pytest.approx(expected, rel=1e-5)


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_resumes_exactly(tokens, train_config):
    def compiled_run():
        run = Run(tokens, train_config(max_steps=4), torch.bfloat16)
        run.compute.compile(4, 16)
        return run

    whole, parts, resumed = compiled_run(), compiled_run(), compiled_run()
    whole.go(Recorder())
    parts.go(Recorder(stop_after=2))
    content = copy.deepcopy(checkpoint_content(parts.model, parts.optimizer, parts.state))
    resumed.state = restore_checkpoint(content, resumed.model, resumed.optimizer)
    assert resumed.go(Recorder())
    assert torch.equal(resumed.weights(), whole.weights())


def test_an_overflow_in_float16_lowers_the_scale_and_skips_the_step(tokens, train_config):
    run, callbacks = Run(tokens, train_config(max_steps=3), torch.float16), Recorder(stop_after=1)
    run.state.loss_scale = 2.0**40
    before = run.weights()
    run.go(callbacks)
    assert run.state.loss_scale == 2.0**39
    assert torch.equal(run.weights(), before)
    assert callbacks.rows[0]["grad_norm"] is None
    assert math.isfinite(callbacks.rows[0]["train_loss"])


def test_a_float16_run_that_no_scale_can_save_is_divergence(tokens, train_config, monkeypatch):
    run = Run(tokens, train_config(max_steps=100), torch.float16)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(DivergedError, match="at step 27"):  # from 2^16 down to 2^-10
        run.go(Recorder())


def test_mfu_is_flops_over_peak_flops(tokens, train_config):
    run, callbacks = Run(tokens, train_config()), Recorder()
    run.go(callbacks, peak_flops=1e12)
    row = callbacks.rows[-1]
    assert row["mfu"] == pytest.approx(row["tokens_per_s"] * TINY.flops_per_token(16) / 1e12)
    assert row["peak_memory_bytes"] > 1e7
    assert run.state.elapsed_s > run.state.data_s + run.state.log_s > 0


class StopsAt(Recorder):
    """Stops the run at call number `call` of should_stop."""

    def __init__(self, call):
        super().__init__()
        self.left = call

    def should_stop(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("precision", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_stop_at_any_moment_loses_nothing(tokens, train_config, precision):
    config = train_config(max_steps=5, eval_interval=2, min_token_count=2)
    whole = Run(tokens, config, precision)
    whole.go(Recorder())
    stopped_in_evaluation = 0
    for call in range(200):
        first, second = Run(tokens, config, precision), Run(tokens, config, precision)
        callbacks = StopsAt(call)
        if first.go(callbacks):
            break
        assert callbacks.saved == [first.state.step]
        stopped_in_evaluation += first.state.pending_row is not None
        content = copy.deepcopy(checkpoint_content(first.model, first.optimizer, first.state))
        second.state = restore_checkpoint(content, second.model, second.optimizer)
        assert second.go(Recorder())
        assert torch.equal(second.weights(), whole.weights())
        for key in ("step", "train_loss", "val_loss", "grad_norm", "learning_rate"):
            assert [row[key] for row in second.state.history] == [row[key] for row in whole.state.history]
        assert second.state.best_weights.keys() == whole.state.best_weights.keys()
        assert all(torch.equal(w, whole.state.best_weights[n]) for n, w in second.state.best_weights.items())
    assert call > 20  # between micro-batches, steps, and batches of an evaluation
    assert stopped_in_evaluation > 3


def test_the_loss_scale_rises_again(tokens, train_config, monkeypatch):
    monkeypatch.setattr(mixed_precision, "LOSS_SCALE_GROWTH_INTERVAL", 3)
    run = Run(tokens, train_config(max_steps=7), torch.float16)
    run.state.loss_scale = 2.0**8
    run.go(Recorder())
    assert (run.state.loss_scale, run.state.steps_since_overflow) == (2.0**10, 1)
