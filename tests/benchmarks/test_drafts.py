import json

import pytest

from benchmarks import drafts
from gpt2.inference.engine import Engine
from gpt2.inference.quantization import quantize
from gpt2.inference.speculation import Drafter
from tests.conftest import TINY

ROW = {"without": 1000.0, "with": 1500.0, "ratio": 1.5, "drafted": 0.5, "accepted": 0.25}


@pytest.fixture
def engine(tiny_model):
    return Engine(quantize(tiny_model, "fp32"), speculate=False)


def test_passages_are_at_equal_distances_and_of_equal_length():
    assert drafts.passages(range(10), 4, 3) == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]


def test_what_follows_each_passage_is_generated_and_timed(engine):
    generated, seconds = drafts.generate(engine, [[1, 2], [3]], 5, 0.8)
    assert [len(ids) for ids in generated] == [5, 5]
    assert generated == drafts.generate(engine, [[1, 2], [3]], 5, 0.8)[0]
    assert seconds > 0


def test_the_ratio_is_of_the_best_rounds(monkeypatch):
    seconds = iter([4.0, 2.0, 2.0, 3.0])  # in turns: without, with
    monkeypatch.setattr(drafts, "generate", lambda *_: ([[1]], next(seconds)))
    row = drafts.measure({False: None, True: None}, [[0]] * 2, 11, 0.0, rounds=2)
    assert row == {"without": 10.0, "with": 10.0, "ratio": 1.0, "drafted": 0.0, "accepted": 0.0}


def test_texts_that_differ_are_an_error(monkeypatch):
    monkeypatch.setattr(drafts, "generate", lambda engine, *_: ([[int(engine)]], 1.0))
    with pytest.raises(RuntimeError, match="differ"):
        drafts.measure({False: False, True: True}, [[0]], 2, 0.0)


def test_drafts_are_counted_and_still_recorded():
    with drafts.counted() as counts:
        drafter = Drafter()
        before = drafter._accepted
        drafter.record(4, 3)
        drafter.record(2, 0)
    assert counts == {"proposed": 6, "accepted": 3}
    assert drafter._accepted != before
    Drafter().record(1, 1)
    assert counts["proposed"] == 6


def test_without_the_compiled_kernels_there_is_nothing_to_measure(tmp_path, monkeypatch, tiny_model):
    monkeypatch.setattr("gpt2.model.storage.load_folder", lambda folder: tiny_model)
    with pytest.raises(SystemExit, match="drafts need the compiled kernels"):
        drafts.engine(tmp_path, "fp32", TINY.block_size, drafts=True)


def test_the_table_has_a_row_for_each_measurement(tmp_path):
    row = {"dtype": "int8", "text": "Python source", "temperature": 0.5, **ROW}
    report = {"machine": "A CPU", "version": "commit 1", "length": 128, "rows": [row]}
    drafts.write(report, tmp_path)
    lines = (tmp_path / "drafts.md").read_text().splitlines()
    assert lines[-1] == "| int8 | Python source | 0.5 | 1,000 | 1,500 | 1.50 | 0.50 | 25% |"
    assert json.loads((tmp_path / "drafts.json").read_text()) == report
