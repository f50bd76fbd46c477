import pytest
import torch

from gpt2.errors import FileError
from gpt2.training import state
from gpt2.training.state import ThroughputMeter, checkpoint_content, restore_checkpoint
from tests.conftest import TINY
from tests.gpt2.training.small_run import Run


def test_a_checkpoint_has_the_keys_of_the_original_project(tokens, train_config):
    run = Run(tokens, train_config())
    content = checkpoint_content(run.model, run.optimizer, run.state)
    assert content["config"] == TINY.to_dict()
    assert {"model_state_dict", "optimizer_state_dict"} <= content.keys()


def test_a_checkpoint_of_another_format_is_refused(tokens, train_config):
    run = Run(tokens, train_config())
    content = checkpoint_content(run.model, run.optimizer, run.state)
    for version in (2, 4, None, "3"):
        with pytest.raises(FileError, match="delete its folder to start a new run"):
            restore_checkpoint({**content, "format_version": version}, run.model, run.optimizer)


def test_the_best_weights_are_stored_once_and_restored(tokens, train_config):
    run, resumed = Run(tokens, train_config()), Run(tokens, train_config())
    run.state.step, run.state.best_step = 3, 3
    content = checkpoint_content(run.model, run.optimizer, run.state)
    assert content["best_model_state_dict"] == {}
    best = restore_checkpoint(content, resumed.model, resumed.optimizer).best_weights
    assert best.keys() == dict(run.model.named_parameters()).keys()
    assert all(torch.equal(best[name], parameter) for name, parameter in run.model.named_parameters())

    run.state.best_step, run.state.best_weights = 2, {"w": torch.ones(1)}
    content = checkpoint_content(run.model, run.optimizer, run.state)
    restored = restore_checkpoint(content, resumed.model, resumed.optimizer)
    assert (restored.step, restored.best_step, restored.best_weights) == (3, 2, {"w": torch.ones(1)})


def test_throughput_is_that_of_the_last_steps_without_the_time_between_them(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr(state.time, "perf_counter", lambda: now_s[0])
    meter = ThroughputMeter(tokens_per_step=100)
    for step_s in [10.0] * 5 + [0.5] * state.THROUGHPUT_WINDOW_STEPS:
        now_s[0] += 7.0  # an evaluation
        assert meter.restart() == 7.0
        now_s[0] += step_s
        assert meter.step() == step_s
    assert meter.tokens_per_s == pytest.approx(200)
