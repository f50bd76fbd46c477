import json
from dataclasses import replace

import pytest
import torch
from ruamel.yaml import YAML

from gpt2.errors import FileError
from gpt2.files import write_json
from gpt2.model.storage import save_weights
from stages import export_to_space, paths
from stages.params import load_params
from tests.conftest import ROOT, TINY, our_text, tokenize, write_documents

CORPUS = {
    "name": "mine",
    "source": "/home/me/mine.txt",
    "characters": 10_000,
    "licence": "unknown",
    "fallback_reason": None,
}
METRICS = {
    "loss": 5.43219,
    "perplexity": 228.7,
    "bits_per_byte": 2.5,
    "bits_per_byte_low": 2.41234,
    "bits_per_byte_high": 2.6,
    "task/cloze/acc": 0.31234,
    "task/cloze/acc_stderr": 0.02345,
    "task/cloze/questions": 400,
}


@pytest.fixture
def trained(tmp_path, monkeypatch, tiny_model):
    """A folder with the inputs of the export stage."""
    for name in ("gpt2", "space"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    save_weights(tiny_model.state_dict(), paths.MODELS / "model.safetensors")
    write_json(paths.MODELS / "config.json", TINY.to_dict())
    write_json(paths.RUN, {"mlflow_run_id": "abc", "sequence_length": 16})
    write_json(paths.CORPUS_FACTS, CORPUS)
    write_json(paths.TRAIN_REPORT / "metrics.json", {"steps": 10, "tokens": 640})
    (paths.TRAIN_REPORT / "loss.png").write_bytes(b"a picture")
    write_documents(tmp_path / "data", [our_text(200)])
    tokenize(tmp_path / "data")
    write_json(paths.EVALUATE_REPORT / "metrics.json", METRICS)
    write_json(paths.EVALUATE_REPORT / "samples.json", [{"prompt": "The miller", "sample": " waits"}])
    return load_params(ROOT / "params.yaml")


def test_both_folders_are_written_and_verified(trained, capsys, never_stops):
    export_to_space.export(trained, "abc", never_stops)
    output = capsys.readouterr().err
    assert "dist/space: the same logits to 0" in output
    assert "dist/hf: the same logits to" in output
    manifest = json.loads((paths.SPACE / "manifest.json").read_text())
    assert manifest["model"]["context"] == 16
    assert manifest["model"]["examples"] == ["The miller"]
    assert manifest["model"]["validation_loss"] == 5.4322
    assert manifest["model"]["corpus_source"] == "mine.txt"
    assert set(manifest["sha256"]) >= {"gpt_model.pt", "gpt_config.pt", "app.py", "gpt2/model/transformer.py"}
    card = (paths.SPACE / "README.md").read_text()
    assert "5.4322 nats per token" in card
    assert (
        "| bits per byte | 2.5 (95 % interval 2.4123 to 2.6) |\n| cloze, acc | 0.312 ± 0.023 |\n| loss by dtype |"
        in card
    )
    assert "/home/me" not in card
    losses = manifest["model"]["dtype_losses"]
    assert set(losses) == {"fp32", "bf16", "int8"}
    assert losses["int8"] == pytest.approx(losses["fp32"], rel=5e-3)
    assert losses["int8"] != losses["fp32"]
    change = 100 * (losses["int8"] / losses["fp32"] - 1)
    assert f"fp32 {losses['fp32']:.4f}, bf16 {losses['bf16']:.4f} (" in card
    assert f", int8 {losses['int8']:.4f} ({change:+.2f} %)" in card
    model_card = (paths.HUGGING_FACE / "README.md").read_text()
    assert "{{" not in card + model_card
    assert "to 2.6) |\n| cloze, acc | 0.312 ± 0.023 |\n| MLflow run |" in model_card
    assert YAML(typ="safe").load(model_card.split("---")[1])["pipeline_tag"] == "text-generation"
    front = YAML(typ="safe").load(card.split("---")[1])
    assert front["suggested_hardware"] == "cpu-basic"
    assert front["sdk_version"].count(".") == 2
    assert front["python_version"] == "3.12"


def test_a_space_that_cannot_load_its_model_fails_the_stage(trained, monkeypatch, never_stops):
    def write_other(model, folder):
        torch.save(TINY.to_dict(), folder / "gpt_config.pt")
        torch.save({"transformer.wte.weight": torch.zeros(3)}, folder / "gpt_model.pt")

    monkeypatch.setattr("gpt2.hub.export.save_space_model", write_other)
    with pytest.raises(FileError, match=r"dist/space cannot be loaded: gpt2\.errors\.FileError: The model cannot be"):
        export_to_space.export(trained, None, never_stops)


def test_wrong_weights_fail_the_stage(trained, monkeypatch, never_stops):
    from gpt2.hub import export
    from gpt2.model.transformer import GPT

    right = export.save_pretrained
    torch.manual_seed(1)
    monkeypatch.setattr(export, "save_pretrained", lambda _, folder: right(GPT(TINY), folder))
    with pytest.raises(FileError, match="the logits of dist/hf differ from the trained model's by"):
        export_to_space.export(trained, None, never_stops)


def test_a_space_for_zero_gpu_has_its_requirements(trained, monkeypatch, never_stops):
    target = replace(trained, export=replace(trained.export, target="zerogpu"))
    export_to_space.export(target, None, never_stops)
    lines = (paths.SPACE / "requirements.txt").read_text().splitlines()
    assert "spaces" in lines
    assert "torch>=2.8,<2.12" in lines
    assert not [line for line in lines if line.startswith(("--extra-index-url", "torch=="))]
    front = YAML(typ="safe").load((paths.SPACE / "README.md").read_text().split("---")[1])
    assert front["suggested_hardware"] == "zero-a10g"
    assert json.loads((paths.SPACE / "manifest.json").read_text())["model"]["target"] == "zerogpu"


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/me/secret/novel.txt", "novel.txt"),
        ("https://example.org/text.txt", "https://example.org/text.txt"),
        ("https://me:password@example.org/text.txt?token=123#x", "https://example.org/text.txt"),
        ("python-docs (CPython 3.11.7)", "python-docs (CPython 3.11.7)"),
        ("hf://datasets/me/texts@0123/a/*.parquet", "hf://datasets/me/texts@0123/a/*.parquet"),
        ("/home/me/secret/a.txt, https://me:pw@x.org/b?c, /home/me/*.txt", "a.txt, https://x.org/b, *.txt"),
        ("/home/me, my secrets/a.txt", "me, a.txt"),
    ],
)
def test_a_source_is_shown_without_private_parts(source, shown):
    assert export_to_space.public_source(source) == shown
