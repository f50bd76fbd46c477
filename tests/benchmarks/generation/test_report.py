import json

from benchmarks.generation import report
from benchmarks.generation.contenders import FIRST, POSITIONS, TASKS

FACTS = {"instruction_sets": ["avx2"], "read_gb_per_s": 20.0}
FAST = {
    **dict.fromkeys([*TASKS, *POSITIONS], 100.0),
    FIRST: 1234.5,
    "weight_bytes": 100e6,
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
    first = report.best({}, "ours, int8", {"1 x 100": 5.0, FIRST: 5.0, "loss": 5.0})
    second = report.best(first, "ours, int8", {"1 x 100": 4.0, FIRST: 4.0, "loss": 4.0})
    assert second == {"ours, int8": {"1 x 100": 5.0, FIRST: 4.0, "loss": 4.0}}


def test_a_report_has_a_row_for_each_contender(tmp_path):
    reference = {**FAST, "loss": 4.25}
    results = {"ours, fp32": reference, "ours, int8": FAST, "baseline loop, fp32": SLOW}
    report.write(report.merge({}, "A CPU, 2 threads", FACTS, results), tmp_path)
    lines = (tmp_path / "generate.md").read_text(encoding="utf-8").splitlines()
    assert "## A CPU, 2 threads" in lines
    assert "Instruction sets: avx2. Reading memory: 20.0 GB/s." in lines
    assert "| ours, int8 | 100 | 100 | 100 | 100 | 1,234 | 100 | 100 | 1.00 |" in lines
    assert "| baseline loop, fp32 | 25 |  |  |  |  |  |  | 0.25 |" in lines
    assert "| ours, int8 | 100 | 5.0 | 10.0 | 50% | 4.5000 | +0.2500 |" in lines
    assert lines[-2:] == ["- commit 1", "- torch 2"]
    assert report.load(tmp_path)["A CPU, 2 threads"]["results"]["ours, int8"] == json.loads(json.dumps(FAST))
    assert (tmp_path / "generate.png").read_bytes().startswith(b"\x89PNG")
