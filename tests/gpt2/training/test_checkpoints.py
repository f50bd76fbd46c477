import errno
import json
import pickle
from pathlib import Path

import pytest
import torch

from gpt2.errors import FileError
from gpt2.files import write_json
from gpt2.training import checkpoints
from gpt2.training.checkpoints import CheckpointStore
from tests.gpt2.training.small_run import Recorder, Run


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "run")


def content(step):
    return {"step": step, "weights": {"w": torch.full((50,), float(step))}}


def test_the_newest_checkpoint_is_loaded(store):
    assert store.load_newest() is None
    for step in (2, 9, 10):
        store.save(step, content(step))
    assert store.load_newest()["step"] == 10
    assert torch.equal(store.load(9)["weights"]["w"], torch.full((50,), 9.0))


def test_the_newest_two_are_kept_and_leftovers_are_deleted(store):
    (store.folder / "step-000003.tmp").mkdir(parents=True)
    (store.folder / "step-000003.tmp/gpt_model_checkpoint.pt").write_bytes(b"half")
    for step in range(1, 7):
        store.save(step, content(step))
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-000005", "step-000006"]
    store.prune(keep=1)
    assert store.steps() == [6]


def test_a_valid_checkpoint_is_never_overwritten(store):
    path = store.save(3, content(3))
    before = (path / "gpt_model_checkpoint.pt").stat()
    store.save(3, content(4))
    assert store.load(3)["step"] == 3
    assert (path / "gpt_model_checkpoint.pt").stat().st_ino == before.st_ino


def test_the_manifest_has_the_sha256_of_the_checkpoint(store):
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
def test_a_damaged_checkpoint_is_reported_and_skipped(store, damage):
    store.save(1, content(1))
    damage(store.save(2, content(2)))
    warnings = []
    assert store.load_newest(warnings.append)["step"] == 1
    assert len(warnings) == 1
    assert "step-000002" in warnings[0]
    damage(store.path(1))
    with pytest.raises(FileError, match=r"no valid checkpoint in .*; delete this folder"):
        store.load_newest(warnings.append)


def damage_swap(path):
    other = path.parent / "step-000001"
    for name in ("gpt_model_checkpoint.pt", "manifest.json"):
        (path / name).write_bytes((other / name).read_bytes())


def damage_manifest_gone(path):
    (path / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [damage_swap, damage_manifest_gone])
def test_a_swapped_or_partial_checkpoint_is_reported_and_replaced(store, damage):
    store.save(1, content(1))
    damage(store.save(2, content(2)))
    warnings = []
    assert store.load_newest(warnings.append)["step"] == 1
    assert "step-000002" in warnings[0]
    store.save(2, content(2))  # the leftover does not stand in the way
    assert store.load_newest()["step"] == 2


def test_a_damaged_checkpoint_does_not_replace_a_valid_one(store):
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
    with pytest.raises(FileError, match=r"cannot write the checkpoint .* free disk space"):
        store.save(2, content(2))
    assert [path.name for path in store.folder.iterdir()] == ["step-000001"]
    assert store.load_newest()["step"] == 1


def test_a_pickle_is_refused_and_not_executed(store, tmp_path):
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


def test_checkpoints_are_due_by_time_and_take_at_most_2_percent(tokens, train_config, monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now_s[0])

    class Clock(Recorder):
        def progress(self, state, loss, tokens_per_s):
            super().progress(state, loss, tokens_per_s)
            now_s[0] += 25.0

        def save(self, step, content, last):
            super().save(step, content, last)
            now_s[0] += 3.0  # so 150 s have to pass until the next

    callbacks = Clock()
    Run(tokens, train_config(max_steps=16, eval_interval=100)).go(callbacks)
    assert callbacks.saved == [3, 9, 15, 16]


def test_a_failed_save_is_retried_and_the_third_failure_ends_the_run(tokens, train_config):
    class Full(Recorder):
        def __init__(self, failures):
            super().__init__()
            self.failures = failures

        def save(self, step, content, last):
            if step in self.failures:
                raise FileError(f"cannot write {step}")
            super().save(step, content, last)

    callbacks = Full({1, 2, 4})
    assert Run(tokens, train_config(max_steps=6)).go(callbacks, checkpoint_interval=1)
    assert callbacks.saved == [3, 5, 6]
    assert len(callbacks.warnings) == 3
    for failures, expected in (({2, 3, 4}, "cannot write 4"), ({6}, "cannot write 6")):
        with pytest.raises(FileError, match=expected):
            Run(tokens, train_config(max_steps=6)).go(Full(failures), checkpoint_interval=1)


def test_errors_name_the_cause(store, monkeypatch):
    def fails(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    store.save(1, content(1))
    damage_swap(store.save(2, content(2)))
    with pytest.raises(FileError, match=r"step-000002 is damaged: its manifest is that of step 1"):
        store.load(2)
    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(FileError, match="Input/output error"):
        store.save(3, content(3))
    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(FileError, match=r"cannot read the checkpoint .*step-000001: .*Input/output error"):
        store.load(1)


def test_a_checkpoint_that_holds_no_dict_is_refused(store):
    store.save(1, [1, 2])
    with pytest.raises(FileError, match=r"step-000001: it does not contain a dict"):
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
