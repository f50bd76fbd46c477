import json

import pytest

from benchmarks import generate
from gpt2.config import PRESETS
from tests.conftest import TINY


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2.device.configure_device", lambda device: None)  # it changes the allocator of this process
    monkeypatch.setitem(PRESETS, "gpt2", TINY)
    generate.prepare(tmp_path)
    return tmp_path


def test_all_contenders_generate_the_same_tokens(prepared):
    ours, batched = generate.ours(prepared, "fp32")
    theirs, theirs_batched = generate.transformers(prepared, "float32")
    assert batched
    assert theirs_batched
    prompt = [5, 17, 300]
    expected = theirs(prompt, 2, 6)[:, len(prompt) :].tolist()
    assert [[token.id for token in tokens] for tokens in ours(prompt, 2, 6)] == expected


def test_the_baseline_loop_generates_all_tokens(prepared):
    write, batched = generate.loop(prepared, "float32")
    assert write([1, 2], 1, 4).shape == (1, 6)
    assert not batched


def test_a_report_has_a_row_for_each_contender(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "REPORT", tmp_path)
    numbers = {**dict.fromkeys(generate.TASKS, 100.0), generate.FIRST: 1234.5}
    slow = {"1 x 100": 25.0}
    generate.report({"ours, int8": numbers, "baseline loop, fp32": slow})
    lines = (tmp_path / "generate.md").read_text(encoding="utf-8").splitlines()
    assert "| ours, int8 | 100 | 100 | 100 | 100 | 1,234 | 1.00 |" in lines
    assert "| baseline loop, fp32 | 25 |  |  |  |  | 0.25 |" in lines
    assert json.loads((tmp_path / "generate.json").read_text(encoding="utf-8"))["results"]["ours, int8"] == numbers
    assert (tmp_path / "generate.png").read_bytes().startswith(b"\x89PNG")
