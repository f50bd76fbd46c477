import json

import numpy as np
import pytest

from benchmarks import compare
from tests.conftest import our_text, tokenize, write_documents


@pytest.fixture
def losses():
    """Of runs without training: noise of the seed, which the other setting shares, and of the seed in each segment."""
    generator = np.random.default_rng(0)
    seeds = generator.normal(2.6, 0.015, (60, 1))
    base = seeds + generator.normal(0, 0.03, (60, compare.SEGMENTS))
    return {"base": base, "near": seeds[:40] + 0.02 + generator.normal(0, 0.03, (40, compare.SEGMENTS))}


def test_the_report_counts_verdicts(losses, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "REPORT", tmp_path)
    monkeypatch.setattr(compare, "CASES", ((1, 2, False), (3, 0, True)))
    compare.report(losses, 40)
    result = json.loads((tmp_path / "compare.json").read_text())
    assert result["true_difference"] == pytest.approx(0.02, abs=0.003)
    assert result["spread_of_pairs"] < 0.5 * result["spread_of_seeds"]["base"]
    assert result["disjoint_pairs"]["pairs"] == 30
    single, paired = result["rows"]
    assert single["false_better"] + single["false_worse"] <= 0.15
    assert paired["found_worse"] > single["found_worse"] + 0.2
    lines = (tmp_path / "compare.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 3


def test_runs_differ_and_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "SEGMENTS", 3)
    monkeypatch.setattr(compare, "STEPS", 3)
    monkeypatch.setattr("stages.paths.TOKENS", tmp_path / "tokens")
    write_documents(tmp_path, [our_text(200)])
    tokenize(tmp_path)
    first = compare.train_all(2, 1, tmp_path / "runs.npz")
    assert {name: rows.shape for name, rows in first.items()} == {"base": (2, 3), "near": (1, 3)}
    assert not np.allclose(first["base"][0], first["base"][1])
    monkeypatch.setattr(compare, "text", lambda: (None, None))  # nothing is left to train
    again = compare.train_all(2, 1, tmp_path / "runs.npz")
    assert np.array_equal(again["base"], first["base"])
