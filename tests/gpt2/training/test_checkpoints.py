import errno
import json
import math
import pickle
from pathlib import Path

import pytest
import torch

from gpt2.errors import DivergedError, FileError
from gpt2.files import fingerprint, write_json
from gpt2.model.storage import load_folder, save_weights, trained_context_length
from gpt2.training import checkpoints
from gpt2.training.checkpoints import CheckpointSaver, CheckpointStore
from gpt2.training.optimizers import Optimizer
from gpt2.training.state import TrainState
from tests.conftest import TINY


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "run")


def content(step):
    return {"step": step, "weights": {"w": torch.full((50,), float(step))}}


def test_the_newest_checkpoint_comes_back(store):
    assert store.load_newest() is None
    for step in (2, 9, 10):
        store.save(step, content(step))
    assert store.load_newest()["step"] == 10
    assert torch.equal(store.load(9)["weights"]["w"], torch.full((50,), 9.0))


def test_the_newest_two_are_kept_and_leftovers_go(store):
    (store.folder / "step-000003.tmp").mkdir(parents=True)
    (store.folder / "step-000003.tmp/gpt_model_checkpoint.pt").write_bytes(b"half")
    for step in range(1, 7):
        store.save(step, content(step))
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-000005", "step-000006"]
    store.prune(keep=1)
    assert store.steps() == [6]


def test_a_sound_checkpoint_is_never_written_over(store):
    path = store.save(3, content(3))
    before = (path / "gpt_model_checkpoint.pt").stat()
    store.save(3, content(4))
    assert store.load(3)["step"] == 3
    assert (path / "gpt_model_checkpoint.pt").stat().st_ino == before.st_ino


def test_the_manifest_has_the_sum_of_the_file(store):
    path = store.save(3, content(3))
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert len(manifest["sha256"]["gpt_model_checkpoint.pt"]) == 64


def damage_truncate(path):
    data = (path / "gpt_model_checkpoint.pt").read_bytes()
    (path / "gpt_model_checkpoint.pt").write_bytes(data[: len(data) // 2])


def damage_flip(path):
    data = bytearray((path / "gpt_model_checkpoint.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "gpt_model_checkpoint.pt").write_bytes(data)


def damage_remove(path):
    (path / "gpt_model_checkpoint.pt").unlink()


def damage_manifest(path):
    (path / "manifest.json").write_text('{"sha256": 3}')


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_remove, damage_manifest])
def test_a_damaged_checkpoint_is_named_and_passed_over(store, damage):
    store.save(1, content(1))
    damage(store.save(2, content(2)))
    warnings = []
    assert store.load_newest(warnings.append)["step"] == 1
    assert len(warnings) == 1
    assert "step-000002" in warnings[0]
    damage(store.path(1))
    with pytest.raises(FileError, match=r"no checkpoint in .* is sound; delete that folder"):
        store.load_newest(warnings.append)


def damage_swap(path):
    other = path.parent / "step-000001"
    for name in ("gpt_model_checkpoint.pt", "manifest.json"):
        (path / name).write_bytes((other / name).read_bytes())


def damage_manifest_gone(path):
    (path / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [damage_swap, damage_manifest_gone])
def test_one_that_is_mixed_up_or_half_deleted_is_named_and_replaced(store, damage):
    store.save(1, content(1))
    damage(store.save(2, content(2)))
    warnings = []
    assert store.load_newest(warnings.append)["step"] == 1
    assert "step-000002" in warnings[0]
    store.save(2, content(2))  # the leftover does not stand in the way
    assert store.load_newest()["step"] == 2


def test_a_damaged_one_does_not_push_out_a_sound_one(store):
    store.save(1, content(1))
    damage_flip(store.save(9, content(9)))
    store.load_newest(lambda _: None)
    store.save(2, content(2))
    assert store.steps() == [1, 2]


def test_a_failed_save_leaves_the_older_ones(store, monkeypatch):
    store.save(1, content(1))

    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(FileError, match=r"cannot write the checkpoint .* make room"):
        store.save(2, content(2))
    assert [path.name for path in store.folder.iterdir()] == ["step-000001"]
    assert store.load_newest()["step"] == 1


def test_a_pickle_is_refused_and_not_run(store, tmp_path):
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    path = store.save(1, content(1))
    (path / "gpt_model_checkpoint.pt").write_bytes(pickle.dumps(Hostile(), protocol=2))
    from gpt2.files import sha256_of

    file = path / "gpt_model_checkpoint.pt"
    write_json(path / "manifest.json", {"step": 1, "sha256": {file.name: sha256_of(file)}})
    with pytest.raises(FileError, match="cannot read the checkpoint"):
        store.load(1)
    assert not canary.exists()


def test_the_fingerprint_changes_with_each_thing_it_is_made_of(tmp_path):
    source = tmp_path / "a.py"
    source.write_text("x = 1")
    before = fingerprint({"lr": 1, "n": 2}, [source])
    assert fingerprint({"n": 2, "lr": 1}, [source]) == before
    assert fingerprint({"lr": 1.5, "n": 2}, [source]) != before
    source.write_text("x = 2")
    assert fingerprint({"lr": 1, "n": 2}, [source]) != before


def test_a_model_folder_gives_the_model_back(tiny_model, tmp_path):
    save_weights(tiny_model.state_dict(), tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", TINY.to_dict())
    loaded = load_folder(tmp_path)
    idx = torch.arange(20)[None]
    assert torch.equal(loaded(idx)[0], tiny_model(idx)[0])
    assert loaded.lm_head.weight is loaded.transformer["wte"].weight
    assert not loaded.training


@pytest.mark.parametrize(
    ("content", "length"),
    [('{"sequence_length": 128}', 128), ('{"sequence_length": "128"}', None), ("{}", None), ("[]", None), ("{", None)],
)
def test_a_model_folder_may_say_on_what_length_it_was_trained(tmp_path, content, length):
    assert trained_context_length(tmp_path) is None
    (tmp_path / "run.json").write_text(content)
    assert trained_context_length(tmp_path) == length


def test_a_model_folder_that_does_not_fit_is_one_line(tiny_model, tmp_path):
    with pytest.raises(FileError, match="no model can be loaded from"):
        load_folder(tmp_path)
    save_weights(tiny_model.state_dict(), tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {**TINY.to_dict(), "n_layer": 3})
    with pytest.raises(FileError, match=r"do not fit its config\.json") as raised:
        load_folder(tmp_path)
    assert "\n" not in str(raised.value)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(FileError, match="no model can be loaded from"):
        load_folder(tmp_path)


def test_errors_name_the_cause(store, monkeypatch):
    def fails(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    store.save(1, content(1))
    damage_swap(store.save(2, content(2)))
    with pytest.raises(FileError, match=r"step-000002 is mixed up: its manifest is that of 1"):
        store.load(2)
    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(FileError, match="Input/output error"):
        store.save(3, content(3))
    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(FileError, match=r"cannot read the checkpoint .*step-000001: .*Input/output error"):
        store.load(1)


def test_a_checkpoint_that_holds_no_dict_is_refused(store):
    store.save(1, [1, 2])
    with pytest.raises(FileError, match=r"step-000001: it holds no dict"):
        store.load(1)


def test_a_checkpoint_that_cannot_be_deleted_does_not_stop_the_next(store, monkeypatch):
    def busy(folder):
        raise PermissionError(f"{folder} is in use")

    monkeypatch.setattr(checkpoints, "delete_folder", busy)
    for step in (1, 2, 3):
        store.save(step, content(step))
    assert store.steps() == [1, 2, 3]


def test_a_checkpoint_of_a_gpu_loads_without_one(store, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    store.save(1, content(1))
    assert store.load(1)["weights"]["w"].is_cpu


def test_a_pickle_is_refused_even_if_the_environment_asks_for_it(store, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    store.save(1, {"path": Path("a")})  # only a pickle that may run code makes a path
    with pytest.raises(FileError, match="cannot read the checkpoint"):
        store.load(1)


class Disk:
    """Takes the place of a `CheckpointStore` for a `CheckpointSaver`, with a clock of its own."""

    def __init__(self, model, train_config, interval_steps=None):
        self.now_s, self.save_duration_s, self.full, self.saved, self.warnings = 1000.0, 0.0, False, [], []
        self.state = TrainState("float32", micro_batch_size=4)
        self.model, self.optimizer = model, Optimizer(model, train_config())
        self.interval_steps = interval_steps

    def save(self, step, content):
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
