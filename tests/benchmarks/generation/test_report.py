import json

import pytest

from benchmarks.generation import report
from benchmarks.generation.contenders import FIRST, POSITIONS, PRODUCTS, TASKS

FACTS = {"instruction_sets": ["avx2"], "read_gb_per_s": {"64": 30.0, "128": 10.0}}
FAST = {
    **dict.fromkeys([*TASKS, *POSITIONS], 100.0),
    FIRST: 1234.5,
    "weight_bytes": 96e6,
    "version": "commit 1",
    "loss": 4.5,
}
SLOW = {"1 x 100": 25.0, "version": "torch 2"}


def test_results_of_other_cpus_and_other_contenders_are_kept():
    known = report.merge({}, "old", FACTS, {"ours, int8": SLOW})
    known = report.merge(known, "new", FACTS, {"baseline loop, fp32": SLOW})
    known = report.merge(known, "new", FACTS, {"ours, int8": FAST})
    assert known["old"]["results"] == {"ours, int8": SLOW}
    assert list(known["new"]["results"].items()) == [("ours, int8", FAST), ("baseline loop, fp32", SLOW)]
    assert [cpu for cpu, _ in report.worst_first(known)] == ["old", "new"]


def test_the_best_of_the_rounds_counts():
    first = report.best({}, "ours, int8", {"1 x 100": 5.0, FIRST: 5.0, PRODUCTS: 5.0, "loss": 5.0})
    second = report.best(first, "ours, int8", {"1 x 100": 4.0, FIRST: 4.0, PRODUCTS: 4.0, "loss": 4.0})
    assert second == {"ours, int8": {"1 x 100": 5.0, FIRST: 4.0, PRODUCTS: 4.0, "loss": 4.0}}


def test_an_entry_with_one_bandwidth_for_all_sizes_is_left_out(tmp_path):
    report.write({"A CPU": {**FACTS, "results": {"ours, int8": FAST}}}, tmp_path)
    known = json.loads((tmp_path / "generate.json").read_text())
    known["an old one"] = {"instruction_sets": [], "read_gb_per_s": 28.3, "results": {}}
    (tmp_path / "generate.json").write_text(json.dumps(known))
    assert report.load(tmp_path).keys() == {"A CPU"}
    assert report.load(tmp_path / "nowhere") == {}


def test_the_limit_is_that_of_as_many_bytes():
    assert report.limit_ms({"weight_bytes": 96e6}, FACTS) == pytest.approx(96 / 20)
    assert report.limit_ms({"weight_bytes": 500e6}, FACTS) == pytest.approx(500 / 10)  # as the largest measured


def test_what_a_limit_does_not_reach_is_said():
    assert report.unlimited("A CPU, 2 threads") == []
    assert report.unlimited("A CPU, GPT2_OPTIMIZE=0, 2 threads") == []
    (_, note) = report.unlimited("A CPU, ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16, 2 threads")
    assert "CTranslate2 (MKL_ENABLE_INSTRUCTIONS)" in note
    assert "OpenVINO (" not in note
    (_, note) = report.unlimited("A CPU, ONEDNN_MAX_CPU_ISA=AVX2, MKL_ENABLE_INSTRUCTIONS=AVX2, 2 threads")
    assert "MKL" not in note
    assert "llama.cpp (its build)" in note


def test_a_report_has_a_row_for_each_contender(tmp_path):
    reference = {**FAST, "loss": 4.25}
    results = {"ours, fp32": reference, "ours, int8": FAST | {PRODUCTS: 8.0}, "baseline loop, fp32": SLOW}
    report.write(report.merge({}, "A CPU, 2 threads", FACTS, results), tmp_path)
    lines = (tmp_path / "generate.md").read_text(encoding="utf-8").splitlines()
    assert "## A CPU, 2 threads" in lines
    assert "Reading memory, GB/s: 30.0 (64 MB), 10.0 (128 MB)." in lines
    assert "| ours, int8 | 100 | 100 | 100 | 100 | 1,234 | 100 | 100 | 1.00 |" in lines
    assert "| baseline loop, fp32 | 25 |  |  |  |  |  |  | 0.25 |" in lines
    assert "| ours, int8 | 96 | 4.8 | 10.0 | 48% | 4.5000 | +0.2500 |" in lines
    assert [line for line in lines if line.endswith("80% |")] == ["| ours, int8 | 8.00 | 10.00 | 80% |"]
    assert lines[-2:] == ["- commit 1", "- torch 2"]
    assert report.load(tmp_path)["A CPU, 2 threads"]["results"]["ours, fp32"] == json.loads(json.dumps(reference))
    assert (tmp_path / "generate.png").read_bytes().startswith(b"\x89PNG")
