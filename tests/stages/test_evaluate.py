import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from ruamel.yaml import YAML

from gpt2 import tokenizer
from gpt2.data.token_files import read_index, split_sha256
from gpt2.errors import UserError
from gpt2.files import write_json
from gpt2.model.storage import save_weights
from stages import evaluate, paths
from stages.params import load_params
from stages.segment_losses import SegmentLosses
from tests.conftest import ROOT, TINY, our_text, tokenize, write_documents


@pytest.fixture
def trained(tmp_path, monkeypatch, tiny_model):
    """A folder with the inputs of the stage; its params."""
    monkeypatch.chdir(tmp_path)
    save_weights(tiny_model.state_dict(), paths.MODELS / "model.safetensors")
    write_json(paths.MODELS / "config.json", TINY.to_dict())
    write_json(paths.RUN, {"mlflow_run_id": "abc", "sequence_length": 16})
    write_documents(tmp_path / "data", [our_text(600)])
    tokenize(tmp_path / "data", 0.5)
    params = load_params(ROOT / "params.yaml")
    return replace(params, evaluate=replace(params.evaluate, max_new_tokens=5, passage_tokens=20))


def test_the_report_has_what_dvc_expects(trained, never_stops, monkeypatch):
    monkeypatch.setattr("gpt2.device.configure_device", lambda *_: None)  # it changes the allocator of this process
    with_cloze = replace(trained, evaluate=replace(trained.evaluate, tasks=["cloze"]))
    metrics = evaluate.evaluate(with_cloze, never_stops)
    assert json.loads((paths.EVALUATE_REPORT / "metrics.json").read_text()) == metrics
    assert all(type(value) in (int, float) and math.isfinite(value) for value in metrics.values())
    assert metrics["bits_per_byte_low"] < metrics["bits_per_byte"] < metrics["bits_per_byte_high"]
    assert 0 < metrics["ece"] < 0.1  # a model without training is unsure of everything
    assert 0 < metrics["contamination"] < 1  # the sentences are of few words
    assert 0.1 < metrics["task/cloze/acc"] < 0.4
    assert metrics["task/cloze/questions"] == 400
    segments = SegmentLosses.from_json(paths.SEGMENT_LOSSES.read_bytes())
    assert segments.tokens == metrics["tokens"]
    assert segments.sha256 == split_sha256(read_index(paths.TOKENS), "val")
    assert segments.losses @ segments.lengths / segments.tokens == pytest.approx(metrics["loss"], abs=1e-5)
    assert segments.bits_per_byte @ segments.byte_counts / metrics["bytes"] == pytest.approx(
        metrics["bits_per_byte"], abs=1e-5
    )
    stage = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]["evaluate"]
    expected = {path for kind in ("outs", "metrics", "plots") for entry in stage[kind] for path in entry}
    assert {path.as_posix() for path in paths.EVALUATE_REPORT.iterdir()} == expected


def test_without_lm_eval_a_task_is_an_error_before_the_model_is_loaded(trained, never_stops, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("gpt2.model.storage.load_folder", lambda _: pytest.fail("the model was loaded"))
    with_task = replace(trained, evaluate=replace(trained.evaluate, tasks=["hellaswag"]))
    with pytest.raises(UserError, match=r"evaluate.tasks needs .* pip install"):
        evaluate.evaluate(with_task, never_stops)


def test_documents_begin_on_lines_of_their_own():
    ids = [*tokenizer.encode("One."), tokenizer.END_OF_TEXT, *tokenizer.encode("Two.")]
    assert evaluate.plain_text(np.array(ids, dtype=np.uint16)) == "One.\nTwo."


def test_the_passage_is_from_the_middle():
    tokens = np.arange(100, dtype=np.uint16)
    assert evaluate.middle(tokens, 10).tolist() == list(range(45, 55))
    assert evaluate.middle(tokens, 1000).tolist() == list(range(100))
