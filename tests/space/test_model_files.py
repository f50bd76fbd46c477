import json
import time
import zipfile

import pytest
import torch

from gpt2.errors import FileError
from space import model_files, server
from space.model_files import load_metadata, load_model
from tests.conftest import TINY
from tests.space.conftest import FACTS, write_manifest

WEIGHTS, CONFIG, MANIFEST = model_files.WEIGHTS, model_files.CONFIG, model_files.MANIFEST


def test_the_exported_model_loads(folder, tiny_model):
    found = load_model(folder)
    idx = torch.arange(12)[None]
    torch.manual_seed(0)
    assert torch.equal(found(idx)[0], type(tiny_model)(TINY)(idx)[0])
    assert found.lm_head.weight is found.transformer["wte"].weight
    assert load_metadata(folder) == FACTS


def changed(folder, change):
    weights = torch.load(folder / WEIGHTS, weights_only=True)
    change(weights)
    torch.save(weights, folder / WEIGHTS)


def flip_a_bit(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / WEIGHTS).write_bytes(data)


# each has a manifest with the right sums, as an attacker would write it
HOSTILE = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "gpt_model.pt is missing"),
    "no config": (lambda f: (f / CONFIG).unlink(), "gpt_config.pt is missing"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), "too small"),
    "empty config": (lambda f: (f / CONFIG).write_bytes(b""), "not a zip file"),
    "truncated": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1000]),
        "too small|cannot be loaded",
    ),
    "padded": (lambda f: (f / WEIGHTS).write_bytes(b"x" * (f / WEIGHTS).stat().st_size), "not a zip file"),
    "wrong shape": (lambda f: changed(f, lambda w: w.update({"transformer.wpe.weight": torch.zeros(16, 32)})), "wpe"),
    "wrong type": (
        lambda f: changed(f, lambda w: w.update({"transformer.ln_f.bias": w["transformer.ln_f.bias"].double()})),
        "float64",
    ),
    "a NaN": (lambda f: changed(f, lambda w: w["transformer.ln_f.bias"].fill_(torch.nan)), "non-finite"),
    "an infinity": (lambda f: changed(f, lambda w: w["transformer.wpe.weight"][3].fill_(torch.inf)), "non-finite"),
    "a weight is missing": (
        lambda f: changed(f, lambda w: w.pop("transformer.ln_f.bias")),
        "no tensor transformer.ln_f",
    ),
    "one too many": (lambda f: changed(f, lambda w: w.update({"other": torch.zeros(1)})), "Unexpected key"),
    "no tensor": (
        lambda f: changed(f, lambda w: w.update({"transformer.ln_f.bias": "x"})),
        "no tensor transformer.ln_f",
    ),
    "sparse": (
        lambda f: changed(f, lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to_sparse()})),
        "no tensor lm_head|unpacks",
    ),
    "no dict": (lambda f: torch.save([torch.zeros(TINY.num_parameters())], f / WEIGHTS), "contains no weights"),
    "other sizes": (lambda f: torch.save({**TINY.to_dict(), "n_layer": 3}, f / CONFIG), "too small|no tensor"),
    "a missing size": (lambda f: torch.save({"n_layer": 2}, f / CONFIG), "has the keys"),
    "a size that is text": (lambda f: torch.save({**TINY.to_dict(), "n_head": "2"}, f / CONFIG), "n_head is '2'"),
    "absurd layers": (lambda f: torch.save({**TINY.to_dict(), "n_layer": 10**9}, f / CONFIG), "n_layer 1000000000"),
    "absurd width": (lambda f: torch.save({**TINY.to_dict(), "n_embd": 2 * 10**9}, f / CONFIG), "too small"),
    "absurd number": (lambda f: torch.save({**TINY.to_dict(), "n_embd": 2 * 10**200}, f / CONFIG), "cannot be loaded"),
    "a config of tensors": (lambda f: torch.save(torch.zeros(3), f / CONFIG), "has the keys"),
    "a huge config": (lambda f: torch.save(torch.zeros(2_000_000), f / CONFIG), "unpacks to more"),
}


def bomb(folder, name):
    """A zip bomb."""
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 300_000_000)
    with (folder / name).open("ab") as file:
        file.write(b"\0" * 60_000)


HOSTILE["a bomb"] = (lambda f: bomb(f, CONFIG), "unpacks to more|not a zip")


@pytest.mark.parametrize("name", HOSTILE)
def test_malicious_files_are_a_quick_one_line_error(folder, name):
    harm, expected = HOSTILE[name]
    harm(folder)
    write_manifest(folder, FACTS)
    start_s = time.monotonic()
    with pytest.raises(FileError, match=expected) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    text = json.dumps(server.build(folder)[0].get_config_file(), default=str)
    assert "The model could not be loaded" in text
    assert "Generate" not in text
    assert time.monotonic() - start_s < 5


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_file_that_is_not_the_exported_one_is_not_even_opened(folder, name):
    if name == WEIGHTS:
        flip_a_bit(folder)
    else:
        (folder / CONFIG).write_bytes(b"other")
    with pytest.raises(FileError, match=f"{name} is damaged"):
        load_metadata(folder)


MANIFESTS = {
    "missing": (None, "manifest.json is missing"),
    "a list": ("[]", "cannot be read"),
    "no JSON": ("{", "cannot be read"),
    "deep": ("[" * 100_000, "cannot be read"),
    "no model": ('{"sha256": {}}', "lacks 'model'"),
    "no sums": (json.dumps({"model": FACTS}), "lacks 'sha256'"),
    "no UTF-8": (b"\xff\xfe", "cannot be read"),
    "large": ("[" + "1," * 3_000_000 + "1]", "is too large"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_an_invalid_manifest_is_reported(folder, name):
    content, expected = MANIFESTS[name]
    (folder / MANIFEST).unlink()
    if content is not None:
        (folder / MANIFEST).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileError, match=expected):
        load_metadata(folder)


@pytest.mark.parametrize("key", sorted(FACTS.keys() & model_files.METADATA.keys()))
@pytest.mark.parametrize("value", [object, [1], float("nan")])
def test_facts_of_the_wrong_type_are_refused(folder, key, value):
    facts = {k: v for k, v in FACTS.items() if k != key} if value is object else {**FACTS, key: value}
    write_manifest(folder, facts)
    with pytest.raises(FileError, match=key if key != "examples" else "examples|cannot"):
        load_metadata(folder)


@pytest.mark.parametrize(
    "wrong",
    [{"context": 0}, {"dtype_losses": {"int8": "x"}}, {"dtype_losses": {"int8": float("inf")}}, {"examples": []}],
)
def test_impossible_facts_are_refused(folder, wrong):
    write_manifest(folder, {**FACTS, **wrong})
    with pytest.raises(FileError, match=r"manifest\.json has no"):
        load_metadata(folder)
