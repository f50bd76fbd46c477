"""The report: results kept for each CPU, as JSON, as tables, and as a picture of the limit that memory sets."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generation.contenders import AROUND, CONTENDERS, FIRST, LOSS_TOKENS, POSITIONS, PRODUCTS, PROMPT, TASKS
from benchmarks.generation.machine import INSTRUCTION_LIMITS

FOLDER = Path("reports/benchmarks")
OURS = "ours, int8"
ONE = "1 x 100"
SHORT = "at position 50"
OBEYS = {
    "OpenVINO": "ONEDNN_MAX_CPU_ISA",
    "OpenVINO's fused attention of single tokens": "nothing",
    "CTranslate2": "MKL_ENABLE_INSTRUCTIONS",
    "PyTorch's fp32 products": "MKL_ENABLE_INSTRUCTIONS",
    "BLAS": "MKL_ENABLE_INSTRUCTIONS",
    "llama.cpp": "its build",
}
"""What limits the instruction sets of those that not every limit of PyTorch and oneDNN reaches, on Intel's CPUs."""
Results = dict[str, dict[str, Any]]
"""For each contender its results, by task, and facts about it."""


def load(folder: Path = FOLDER) -> dict[str, Any]:
    """What is known of each CPU. Entries of older versions, with one bandwidth for all sizes, are left out."""
    path = folder / "generate.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {cpu: entry for cpu, entry in known.items() if isinstance(entry["read_gb_per_s"], dict)}


def merge(known: dict[str, Any], cpu: str, facts: dict[str, Any], results: Results) -> dict[str, Any]:
    """`known` with this CPU's facts and results. Other CPUs and other contenders keep theirs."""
    merged = known.get(cpu, {}).get("results", {}) | results
    ordered = {name: merged[name] for name in CONTENDERS if name in merged}
    return known | {cpu: {**facts, "results": ordered}}


def best(results: Results, name: str, found: dict[str, Any]) -> Results:
    """`results` with a round of one contender: the best of its rounds for each task."""
    before = results.get(name, {})
    kept = dict(found)
    for task in {*TASKS, *POSITIONS, FIRST, PRODUCTS} & before.keys() & found.keys():
        kept[task] = (min if task in (FIRST, PRODUCTS) else max)(before[task], found[task])
    return results | {name: kept}


def write(known: dict[str, Any], folder: Path = FOLDER) -> None:
    """Writes generate.json, generate.md and generate.png."""
    (folder / "generate.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    (folder / "generate.md").write_text("\n".join(lines(known)) + "\n", encoding="utf-8")
    draw(known, folder / "generate.png")


def worst_first(known: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The CPUs, from the slowest of ours to the fastest."""
    return sorted(known.items(), key=lambda item: item[1]["results"].get(OURS, {}).get(ONE, 0))


def lines(known: dict[str, Any]) -> list[str]:
    """generate.md: tables for each CPU."""
    text = [
        "# Generation with GPT-2 124M, side by side",
        "",
        "Made by `python -m benchmarks.generate`; the numbers are in generate.json. New tokens/s after a prompt of "
        f"{len(PROMPT)} tokens, prefill included; `8 x 100` is a batch of eight, 100 tokens each, all eight counted. "
        f"`at position 50` is the speed of {2 * AROUND} tokens around that position, one text. "
        "Random weights, greedy decoding.",
        "",
        "A token reads each weight once. The limit is the time to read them once, at the bandwidth at which as many "
        "bytes are read again and again on this machine: a part of them is in the cache. The losses are those of the "
        f"model in `models/`, in nats per token, on the first {LOSS_TOKENS:,} validation tokens. A contender without "
        "a row could not run.",
    ]
    for cpu, entry in worst_first(known):
        text += ["", f"## {cpu}", "", f"Instruction sets: {', '.join(entry['instruction_sets']) or 'unknown'}."]
        read = ", ".join(f"{speed} ({size} MB)" for size, speed in entry["read_gb_per_s"].items())
        text += [f"Reading memory, GB/s: {read}.", *unlimited(cpu)]
        for table in (speeds(entry["results"]), limits(entry), products(entry["results"])):
            text += ["", *table] if len(table) > 2 else []
        versions = dict.fromkeys(found["version"] for found in entry["results"].values() if "version" in found)
        text += ["", *(f"- {version}" for version in versions)]
    return text


def unlimited(cpu: str) -> list[str]:
    """What the limits in the name of a CPU do not reach, and what would limit it."""
    if not any(f"{limit}=" in cpu for limit in INSTRUCTION_LIMITS):
        return []
    found = [f"{name} ({limit})" for name, limit in OBEYS.items() if f"{limit}=" not in cpu]
    return ["", f"Not limited here, in brackets what would limit it: {', '.join(found)}."]


def speeds(results: Results) -> list[str]:
    """The table of tokens/s."""
    columns = [*TASKS, FIRST, *POSITIONS]
    table = ["| | " + " | ".join(columns) + f" | to {OURS} ({ONE}) |", "|---|" + "---:|" * (len(columns) + 1)]
    ours = results.get(OURS, {}).get(ONE)
    for name, found in results.items():
        cells = [f"{found[column]:,.0f}" if column in found else "" for column in columns]
        ratio = f"{found[ONE] / ours:.2f}" if ours else ""
        table.append(f"| {name} | " + " | ".join([*cells, ratio]) + " |")
    return table


def limits(entry: dict[str, Any]) -> list[str]:
    """The table of weights and losses."""
    results: Results = entry["results"]
    table = [
        f"| | weights, MB | limit, ms per token | {ONE}, ms per token | share of the limit | loss | to ours, fp32 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    reference = results.get("ours, fp32", {}).get("loss")
    for name, found in results.items():
        if "weight_bytes" not in found:
            continue
        limit, needed = limit_ms(found, entry), 1000 / found[ONE]
        loss = f"{found['loss']:.4f}" if "loss" in found else ""
        more = f"{found['loss'] - reference:+.4f}" if "loss" in found and reference is not None else ""
        cells = [f"{found['weight_bytes'] / 1e6:,.0f}", f"{limit:.1f}", f"{needed:.1f}", f"{limit / needed:.0%}"]
        table.append(f"| {name} | " + " | ".join([*cells, loss, more]) + " |")
    return table


def products(results: Results) -> list[str]:
    """The table of the matrix products' share of a token, for those that can compute them alone."""
    table = [f"| | {PRODUCTS} | {SHORT}, ms per token | share of a token |", "|---|---:|---:|---:|"]
    for name, found in results.items():
        if PRODUCTS in found:
            needed = 1000 / found[SHORT]
            table.append(f"| {name} | {found[PRODUCTS]:.2f} | {needed:.2f} | {found[PRODUCTS] / needed:.0%} |")
    return table


def limit_ms(found: dict[str, Any], entry: dict[str, Any]) -> float:
    """Milliseconds to read the weights of a contender once."""
    sizes, speeds = zip(*((1e6 * float(size), speed) for size, speed in entry["read_gb_per_s"].items()), strict=True)
    gb_per_s = np.interp(found["weight_bytes"], sizes, speeds)
    return float(found["weight_bytes"] / gb_per_s / 1e6)


def draw(known: dict[str, Any], path: Path) -> None:
    """Milliseconds per token of one text, and the limit: a column for each CPU."""
    from matplotlib.figure import Figure

    from benchmarks import charts

    cpus = worst_first(known)
    names = [
        name for name in reversed(CONTENDERS) if any("weight_bytes" in e["results"].get(name, {}) for _, e in cpus)
    ]
    figure = Figure(figsize=(2 + 4.5 * len(cpus), 1.2 + 0.22 * len(names)), layout="constrained")
    columns = figure.subplots(1, len(cpus), sharey=True, squeeze=False)[0]
    for axes, (cpu, entry) in zip(columns, cpus, strict=True):
        results = entry["results"]
        values = [1000 / results[name][ONE] if name in results else 0 for name in names]
        labels = [f"{value:.1f}" if value else "" for value in values]
        colors = [charts.OURS if name.startswith("ours") else charts.PEER for name in names]
        model, _, settings = cpu.rpartition("), ")  # one setting on a line: the columns are narrow
        title = f"{model})\n" + settings.replace(", ", "\n") if model else cpu
        charts.draw_bars(axes, names, values, labels, colors, title)
        drawn = [(limit_ms(results[name], entry), y) for y, name in enumerate(names) if name in results]
        axes.plot(*zip(*drawn, strict=True), "|", color="black", markersize=11, label="reading the weights once")
        axes.set_xlabel(f"ms per token, {ONE}", fontsize=8)
    columns[-1].legend(fontsize=8, loc="lower right", frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
