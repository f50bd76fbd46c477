import json
from pathlib import Path

import pytest

from benchmarks import communication
from gpt2.planning.step import Workload, bytes_sent
from tests.conftest import ROOT

MEASURED = json.loads((ROOT / "reports/benchmarks/communication.json").read_text())


@pytest.mark.parametrize(
    "row", MEASURED["rows"], ids=lambda row: f"{row['strategy']}-{row['processes']}-{row['micro_batches']}"
)
def test_the_model_counts_the_bytes_that_were_sent(row):
    workload = Workload.of(communication.CONFIG, communication.CONFIG.block_size)
    model = bytes_sent(row["strategy"], workload, row["micro_batches"], row["processes"])
    assert sum(model.values()) == pytest.approx(row["rings"])
    assert row["measured"] == pytest.approx(row["gloo"], rel=0.01)
    if row["strategy"] == "ddp":
        assert row["measured"] == pytest.approx(row["rings"], rel=0.01)


def test_report_and_docs_show_what_was_measured():
    text = communication.table(MEASURED)
    assert text == (ROOT / "reports/benchmarks/communication.md").read_text()
    table = next(part for part in text.split("\n\n") if part[0] == "|")
    assert table in (ROOT / "docs/scale.md").read_text()


def test_written_bytes_are_those_of_this_process(tmp_path):
    before = communication.written()
    (tmp_path / "file").write_bytes(b"x" * 12345)
    assert communication.written() - before == 12345


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_step_over_gloo_sends_what_the_model_says(strategy, monkeypatch):
    row = communication.measure(strategy, 2, 1)
    assert row["measured"] == pytest.approx(row["gloo"], rel=0.01)
    assert Path("/proc/self/io").is_file()
