import psutil
import pytest

from benchmarks import concurrency

RESULTS = {
    "busy": {
        "date": "2026-01-01",
        "machine": "a CPU, 2 cores",
        "rows": {
            "OpenMP's default": {"0": [900, 1000], "2": [400, 300], "8": [50, 40]},
            "one thread": {"0": [600], "2": [350], "8": [100]},
        },
    },
    "experiments": {"date": "2026-01-01", "steps": 9, "rows": {"-j 1": [100, 120, 90], "-j 2": [80, 81, 95]}},
}


def test_the_table_compares_the_best_rounds_with_the_default_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(concurrency, "REPORT", tmp_path)
    concurrency.write_table(RESULTS)
    table = (tmp_path / "concurrency.md").read_text()
    assert "| OpenMP's default | 1,000 (100%) | 400 (40%) | 50 (5%) |" in table
    assert "| one thread | 600 (60%) | 350 (35%) | 100 (10%) |" in table
    assert "| -j 2 | 81 | 0.81 |" in table  # medians


@pytest.mark.parametrize("count", [0, 2])
def test_busy_processes_end_with_the_block(count):
    with concurrency.busy_processes(count):
        busy = [child for child in psutil.Process().children() if "while True" in " ".join(child.cmdline())]
        assert len(busy) == count
    assert not any(child.is_running() for child in busy)
