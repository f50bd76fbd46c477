import json
import pickle

import pytest
import torch

from gpt2.errors import FileError
from gpt2.files import fingerprint, write_json
from gpt2.model.storage import load_folder, save_weights, trained_context_length
from gpt2.training.checkpoints import CheckpointStore
from tests.conftest import TINY


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


def test_the_fingerprint_changes_with_each_input(tmp_path):
    source = tmp_path / "a.py"
    source.write_text("x = 1")
    before = fingerprint({"lr": 1, "n": 2}, [source])
    assert fingerprint({"n": 2, "lr": 1}, [source]) == before
    assert fingerprint({"lr": 1.5, "n": 2}, [source]) != before
    source.write_text("x = 2")
    assert fingerprint({"lr": 1, "n": 2}, [source]) != before


def test_a_saved_model_loads(tiny_model, tmp_path):
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
def test_a_model_folder_may_contain_its_trained_context_length(tmp_path, content, length):
    assert trained_context_length(tmp_path) is None
    (tmp_path / "run.json").write_text(content)
    assert trained_context_length(tmp_path) == length


def test_a_damaged_model_folder_is_a_one_line_error(tiny_model, tmp_path):
    with pytest.raises(FileError, match="cannot load a model from"):
        load_folder(tmp_path)
    save_weights(tiny_model.state_dict(), tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {**TINY.to_dict(), "n_layer": 3})
    with pytest.raises(FileError, match=r"do not fit its config\.json") as raised:
        load_folder(tmp_path)
    assert "\n" not in str(raised.value)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(FileError, match="cannot load a model from"):
        load_folder(tmp_path)
