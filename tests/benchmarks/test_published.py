import json
import re

import pytest

from benchmarks import published
from tests.conftest import ROOT

RESULTS = published.collect()
REPORT = ROOT / "reports/benchmarks/published.md"


@pytest.mark.parametrize("row", RESULTS["runs"], ids=lambda row: f"{row['who']}, {row['model']}, {row['gpu']}")
def test_the_plan_is_within_a_quarter_of_what_is_published(row):
    assert row["ratio"] == pytest.approx(1, abs=published.TOLERANCE)


@pytest.mark.parametrize("row", RESULTS["costs"], ids=lambda row: row["model"])
def test_hours_and_dollars_are_within_a_quarter(row):
    assert row["plan_hours"] == pytest.approx(row["hours"], rel=published.TOLERANCE)
    assert row["plan_dollars"] == pytest.approx(row["dollars"], rel=published.TOLERANCE)


@pytest.mark.parametrize("row", RESULTS["pairs"], ids=lambda row: f"{row['model']}-{row['tokens']}")
def test_a_step_of_two_gpus_follows_from_that_of_one(row):
    for link in ("nvlink", "host"):
        assert row[f"{link}_ratio"] == pytest.approx(1, abs=published.TOLERANCE)


def test_the_slower_runs_are_slower_and_say_why():
    for row in RESULTS["slower"]:
        assert row["ratio"] > 1 + published.TOLERANCE
        assert row["note"]


def test_every_run_on_a_gpu_is_planned_with_the_same_utilization_and_has_an_address():
    for row in RESULTS["runs"] + RESULTS["slower"] + RESULTS["costs"]:
        assert row["source"].startswith("https://")
    computed = {}
    for run in published.RUNS:
        time = published.predict(run)
        flops = published.MODELS[run.model].flops_per_token * run.batch / run.gpus
        computed.setdefault(run.gpu, set()).add(
            round(flops * (4 / 3 if run.checkpointing else 1) / time.compute_s / 1e12, 3)
        )
    assert {gpu: len(speeds) for gpu, speeds in computed.items()} == {"a100": 1, "h100": 1, "rtx4090": 1}


def test_report_and_docs_have_these_tables():
    tables = published.tables(RESULTS)
    report = REPORT.read_text()
    docs = (ROOT / "docs/scale.md").read_text()
    for name, lines in tables.items():
        assert "\n".join(lines) in report, name
        assert "\n".join(lines) in docs, name
    saved = json.loads((ROOT / "reports/benchmarks/published.json").read_text())
    assert [row["who"] for row in saved["runs"]] == [run.who for run in published.RUNS]


def test_the_utilizations_in_words_are_those_of_the_runs():
    from gpt2.planning.hardware import GPUS

    for name in ("a100", "h100", "rtx4090"):
        measured = [row["published_mfu"] for row in RESULTS["runs"] if row["gpu"] == name and not row["checkpointing"]]
        words = [float(number) for number in re.findall(r"0\.\d\d", GPUS[name].mfu_source)]
        assert min(words) == pytest.approx(min(measured), abs=0.006)
        assert max(words) == pytest.approx(max(measured), abs=0.006)
