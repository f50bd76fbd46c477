import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gpt2.errors import FileError
from gpt2.files import write_json
from gpt2.model import storage
from gpt2.model.storage import load_folder, load_model, masked_documents, save_weights, trained_context_length
from tests.conftest import TINY


def test_a_saved_model_loads(tiny_model, tmp_path):
    save_weights(tiny_model.state_dict(), tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", TINY.to_dict())
    loaded = load_folder(tmp_path)
    idx = torch.arange(20)[None]
    assert torch.equal(loaded(idx)[0], tiny_model(idx)[0])
    assert loaded.lm_head.weight is loaded.transformer["wte"].weight
    assert not loaded.training


def test_a_full_disk_is_told(tiny_model, tmp_path, monkeypatch):
    def save_file(weights, path, metadata):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(storage, "save_file", save_file)
    with pytest.raises(FileError, match=r"cannot write .*model.safetensors \(I/O error: .*\); free disk space"):
        save_weights(tiny_model.state_dict(), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "length"),
    [('{"sequence_length": 128}', 128), ('{"sequence_length": "128"}', None), ("{}", None), ("[]", None), ("{", None)],
)
def test_a_model_folder_may_contain_its_trained_context_length(tmp_path, content, length):
    assert trained_context_length(tmp_path) is None
    (tmp_path / "run.json").write_text(content)
    assert trained_context_length(tmp_path) == length


def test_a_model_folder_says_whether_documents_were_masked(tmp_path):
    assert not masked_documents(tmp_path)
    for value in (False, True, "yes"):
        write_json(tmp_path / "run.json", {"mask_documents": value})
        assert masked_documents(tmp_path) is (value is True)


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


def test_the_tied_head_is_not_saved(tiny_model, tmp_path):
    save_weights(tiny_model.state_dict(), tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == tiny_model.state_dict().keys() - {"lm_head.weight"}


@pytest.mark.parametrize("source", ["gpt2", "gpt2-xl", "user/name"])
def test_names_are_loaded_from_the_hub(source, monkeypatch, tmp_path, tiny_model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()  # such as this package
    loaded = []
    monkeypatch.setattr(storage, "from_pretrained", lambda name: loaded.append(name) or tiny_model)
    assert load_model(source) is tiny_model
    assert loaded == [source]


def test_a_folder_with_the_form_of_a_name_is_loaded_from_the_disk(monkeypatch, tmp_path, tiny_model):
    monkeypatch.chdir(tmp_path)
    save_weights(tiny_model.state_dict(), tmp_path / "user/name/model.safetensors")
    write_json(tmp_path / "user/name/config.json", TINY.to_dict())
    idx = torch.arange(20)[None]
    assert torch.equal(load_model("user/name")(idx)[0], tiny_model(idx)[0])
