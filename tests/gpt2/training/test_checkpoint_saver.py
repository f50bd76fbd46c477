"""When a checkpoint is due, and what a save that fails does."""

import math

import pytest
import torch

from gpt2.errors import DivergedError, FileError
from gpt2.optimizers.optimizer import Optimizer
from gpt2.training import checkpoints
from gpt2.training.checkpoints import CheckpointSaver
from gpt2.training.state import TrainState


class Disk:
    """Takes the place of a `CheckpointStore` for a `CheckpointSaver`, with a clock of its own."""

    def __init__(self, model, train_config, interval_steps=None):
        self.now_s, self.save_duration_s, self.full, self.saved, self.warnings = 1000.0, 0.0, False, [], []
        self.state = TrainState("float32", micro_batch_size=4)
        self.model, self.optimizer = model, Optimizer(model, train_config())
        self.interval_steps = interval_steps

    def save(self, step, content, last):
        self.now_s += self.save_duration_s
        if self.full:
            raise FileError(f"cannot write step {step}")
        self.saved.append((step, content))

    def saver(self):
        return CheckpointSaver(
            self.model, self.optimizer, save=self.save, warn=self.warnings.append, interval_steps=self.interval_steps
        )


@pytest.fixture
def disk(tiny_model, train_config, monkeypatch):
    disk = Disk(tiny_model, train_config)
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: disk.now_s)
    return disk


def test_a_checkpoint_is_due_at_each_multiple_of_the_interval(disk):
    disk.interval_steps = 5
    saver = disk.saver()
    assert [step for step in range(1, 16) if saver.is_due(step)] == [5, 10, 15]


def test_a_checkpoint_is_due_after_a_minute(disk):
    saver = disk.saver()
    disk.now_s += 59.5
    assert not saver.is_due(3)
    disk.now_s += 0.5
    assert saver.is_due(3)


def test_a_checkpoint_is_due_after_fifty_times_the_duration_of_the_last(disk):
    saver = disk.saver()
    disk.save_duration_s, disk.state.step = 3.0, 1
    saver.save(disk.state)
    disk.now_s += 149.5
    assert not saver.is_due(2)
    disk.now_s += 0.5
    assert saver.is_due(2)


def test_a_step_is_saved_once(disk):
    saver = disk.saver()
    for disk.state.step in (1, 1, 2):
        saver.save(disk.state)
    assert [step for step, _ in disk.saved] == [1, 2]
    for step, saved in disk.saved:
        assert saved["state"]["step"] == step
        assert saved["model_state_dict"].keys() == disk.model.state_dict().keys()
        assert saved["optimizer_state_dict"].keys() == disk.optimizer.state_dict().keys()


def test_the_time_of_all_saves_but_the_last_is_counted(disk):
    saver = disk.saver()
    for disk.state.step, disk.save_duration_s in ((1, 2.0), (2, 3.0)):
        saver.save(disk.state)
    assert disk.state.save_s == 5.0
    disk.state.step = 3
    saver.save(disk.state, last=True)
    assert disk.state.save_s == 5.0


def test_failures_are_warnings_until_three_in_a_row(disk):
    saver = disk.saver()
    outcomes = [False, False, True, False, False, False]
    for disk.state.step, works in enumerate(outcomes[:-1], start=1):
        disk.full = not works
        saver.save(disk.state)
    assert [step for step, _ in disk.saved] == [3]
    assert len(disk.warnings) == 4
    assert "cannot write step 1" in disk.warnings[0]
    disk.state.step = 6
    with pytest.raises(FileError, match="cannot write step 6"):
        saver.save(disk.state)


def test_a_failure_of_the_last_checkpoint_is_an_error(disk):
    disk.full = True
    with pytest.raises(FileError, match="cannot write step 0"):
        disk.saver().save(disk.state, last=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["weights", "moments"])
def test_non_finite_values_are_never_saved(disk, where, value):
    weight = disk.model.transformer["wpe"].weight
    weight.grad = torch.zeros_like(weight)
    disk.optimizer.step()  # makes the moments
    saver = disk.saver()
    disk.state.step = 7
    with torch.no_grad():
        (weight if where == "weights" else disk.optimizer.parts["adamw"].state[weight]["exp_avg"])[0, 0] = value
    with pytest.raises(DivergedError, match=r"after step 7 .* train\.learning_rate") as raised:
        saver.save(disk.state)
    assert raised.value.good_steps == 7
    assert not disk.saved


def test_large_weights_are_saved_as_long_as_they_are_finite(disk):
    with torch.no_grad():
        disk.model.transformer["wpe"].weight.fill_(1e30)  # the sum of their squares is infinite
    disk.saver().save(disk.state)
    assert disk.saved
