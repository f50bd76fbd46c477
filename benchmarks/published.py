"""The plan of `python -m gpt2 plan` beside runs that others published.

    python -m benchmarks.published    at once: nothing is measured here

Each run has the address of its numbers. The plan gets the model, the GPUs, the batch and the strategy of the run; its
model FLOPs utilization is that of the GPU in `gpt2/planning/hardware.py`, the same for all runs on that GPU. A second
table starts from the step of one GPU that the same source measured, so that it compares communication alone. Writes
reports/benchmarks/published.{json,md}; the tables in docs/ are copies, which a test compares.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.published_runs import COSTS, MODELS, PAIRS, RUNS, SLOWER, TWO_GPUS, TWO_NVLINKS, Published
from gpt2.config import PRESETS
from gpt2.planning.hardware import LINKS, Cluster, build_cluster, find_gpu
from gpt2.planning.step import StepTime, Work, Workload, step_time

REPORT = Path("reports/benchmarks")
TOLERANCE = 0.25


def predict(run: Published) -> StepTime:
    """The planned step of a published run."""
    gpu = find_gpu(run.gpu)
    micro_batches = run.batch // run.gpus // run.micro
    work = Work(run.micro, micro_batches, gpu.mfu * gpu.peak_flops, gpu.bytes_per_s, run.optimizer, run.checkpointing)
    return step_time(run.strategy, MODELS[run.model], work, build_cluster(gpu, run.gpus))


def compare(runs: Iterable[Published]) -> list[dict[str, Any]]:
    """Tokens/s of all GPUs, published and planned."""
    rows = []
    for run in runs:
        planned = run.batch / predict(run).total_s
        flops = MODELS[run.model].flops_per_token * run.tokens_per_s / run.gpus
        mfu = flops / find_gpu(run.gpu).peak_flops
        rows.append(asdict(run) | {"published_mfu": mfu, "plan": planned, "ratio": planned / run.tokens_per_s})
    return rows


def compare_costs() -> list[dict[str, Any]]:
    """Hours and dollars of llm.c's runs, at the price that its authors paid."""
    rows = []
    for model, gpu, batch, steps, price, hours, dollars, source in COSTS:
        run = next(each for each in RUNS if (each.who, each.model, each.gpu) == ("llm.c", model, gpu))
        planned = predict(run).total_s * steps / 3600
        rows.append(
            {
                "model": model,
                "gpu": gpu,
                "tokens": batch * steps,
                "hours": hours,
                "dollars": dollars,
                "plan_hours": planned,
                "plan_dollars": planned * 8 * price,
                "source": source,
            }
        )
    return rows


def compare_pairs() -> list[dict[str, Any]]:
    """Milliseconds of a step on two GPUs, published and planned from the published step on one."""
    rows = []
    for name, length, one_s, nvlink_s, host_s in PAIRS:
        workload = Workload.of(PRESETS[name], length)
        tokens = 4 * length
        alone_s = one_s / 400
        work = Work(tokens, 1, workload.flops_per_token * tokens / alone_s, float("inf"))
        row: dict[str, Any] = {"model": name, "tokens": tokens, "alone_ms": 1000 * alone_s}
        for label, link, measured_s in (("nvlink", TWO_NVLINKS, nvlink_s), ("host", LINKS["pcie3-host"], host_s)):
            planned_s = step_time("ddp", workload, work, Cluster(2, 2, link, link)).total_s
            row[f"{label}_ms"] = 1000 * measured_s / 200
            row[f"{label}_plan_ms"] = 1000 * planned_s
            row[f"{label}_ratio"] = planned_s / (measured_s / 200)
        rows.append(row)
    return rows


def tables(results: dict[str, Any]) -> dict[str, list[str]]:
    """The tables in Markdown, by name."""

    def runs(rows: list[dict[str, Any]]) -> list[str]:
        lines = ["| run | model | GPUs | strategy | published tokens/s | its MFU | plan | plan / published |"]
        lines.append("|---|---|---|---|---:|---:|---:|---:|")
        for row in rows:
            note = f" ({row['note']})" if row["note"] else ""
            strategy = row["strategy"] + (", Muon" if row["optimizer"] == "muon" else "")
            strategy += ", gradient checkpointing" if row["checkpointing"] else ""
            address = row["source"].split(" (")
            where = f" {address[1][:-1]}" if len(address) > 1 else ""
            lines.append(
                f"| [{row['who']}{where}]({address[0]}){note} | {row['model']} | {row['gpus']} x {row['gpu']} | "
                f"{strategy} | {row['tokens_per_s']:,.0f} | {row['published_mfu']:.0%} | {row['plan']:,.0f} | "
                f"{row['ratio']:.2f} |"
            )
        return lines

    costs = ["| run | tokens | published hours | plan | published dollars | plan |", "|---|---:|---:|---:|---:|---:|"]
    costs += [
        f"| [llm.c, {row['model']}, 8 x {row['gpu']}]({row['source']}) | {row['tokens'] / 1e9:.1f}B | "
        f"{row['hours']:.1f} | {row['plan_hours']:.1f} | {row['dollars']:,} | {row['plan_dollars']:,.0f} |"
        for row in results["costs"]
    ]
    pairs = [
        "| model | tokens of a GPU | one GPU | NVLink | plan | ratio | through the CPU's memory | plan | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    pairs += [
        f"| `{row['model']}` | {row['tokens']:,} | {row['alone_ms']:.0f} ms | {row['nvlink_ms']:.0f} ms | "
        f"{row['nvlink_plan_ms']:.0f} ms | {row['nvlink_ratio']:.2f} | {row['host_ms']:.0f} ms | "
        f"{row['host_plan_ms']:.0f} ms | {row['host_ratio']:.2f} |"
        for row in results["pairs"]
    ]
    return {"runs": runs(results["runs"]), "slower": runs(results["slower"]), "costs": costs, "pairs": pairs}


def collect() -> dict[str, Any]:
    """All comparisons."""
    return {
        "runs": compare(RUNS),
        "slower": compare(SLOWER),
        "costs": compare_costs(),
        "pairs": compare_pairs(),
        "pairs_source": TWO_GPUS,
    }


def main() -> None:
    """Writes the report."""
    results = collect()
    found = tables(results)
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / "published.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = [
        "# The plan beside published runs",
        "",
        "Made by `python -m benchmarks.published`. Tokens/s are those of all GPUs.",
        *("", *found["runs"]),
        *("", "Hours and dollars, at the price that the authors paid:"),
        *("", *found["costs"]),
        *("", f"A step of two TITAN RTX, planned from the [published]({TWO_GPUS}) step of one:"),
        *("", *found["pairs"]),
        *("", "Slower runs than the plan assumes:"),
        *("", *found["slower"]),
    ]
    (REPORT / "published.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
