"""Tokens/s, MFU and peak memory of a training step: ours and those of other implementations, side by side.

    python -m benchmarks.train                      all cases, about a quarter of an hour on two cores
    python -m benchmarks.train --case laptop        one of them
    python -m benchmarks.train --device cuda

Each contender runs in its own process, one after the other, on the same random tokens; the result is the median step.
"The tokens of a text" trains on those of the last pipeline run, with train.min_token_count 2; `dvc repro` first.
Peers run as their users run them, without our allocator settings, except where the name says so. The baseline is the
plain fp32 training script of the original project. Writes reports/benchmarks/train.{json,md,png}, or with --name the
files of another machine beside them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.steps import make_step, text_batches
from gpt2.errors import GPT2Error

if TYPE_CHECKING:
    from gpt2.device import DeviceName

REPORT = Path("reports/benchmarks")
TIMED_STEPS, TIMED_S = 40, 25.0
"""Steps are timed until one of these is reached, but at least two."""
# model sizes (as in GPTConfig, without the vocabulary), sequences, their length, micro-batches
GPT2 = {"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
LAPTOP = {"block_size": 128, "n_layer": 4, "n_head": 4, "n_embd": 256}
CASES: dict[str, tuple[dict[str, int], int, int, int]] = {
    "laptop": (LAPTOP, 8, 128, 1),
    "gpt2-128": (GPT2, 32, 128, 2),
    "gpt2-1024": (GPT2, 4, 1024, 1),
    "gpt2-gpu": (GPT2, 32, 1024, 2),
}
OURS = {
    "ours, {reduced}": {"precision": "reduced", "compile": True},
    "ours, {reduced}, not compiled": {"precision": "reduced", "compile": False},
    "ours, {reduced}, gradient checkpointing": {"precision": "reduced", "compile": True, "checkpointing": True},
    "ours, {reduced}, Muon": {"precision": "reduced", "compile": True, "optimizer": "muon"},
    "ours, {reduced}, the tokens of a text": {"precision": "reduced", "compile": True, "text": True},
    "ours, fp32": {"precision": "fp32", "compile": True},
}
PEERS = {
    "nanoGPT-style, {reduced} autocast, compiled": {"peer": "plain", "precision": "reduced", "compile": True},
    "nanoGPT-style, our allocator settings": {
        "peer": "plain",
        "precision": "reduced",
        "compile": True,
        "prepared": True,
    },
    "Transformers, {reduced} autocast, compiled": {"peer": "transformers", "precision": "reduced", "compile": True},
    "Transformers, {reduced} autocast": {"peer": "transformers", "precision": "reduced", "compile": False},
    "baseline, fp32": {"peer": "plain", "precision": "fp32", "compile": False},
}
CONTENDERS: dict[str, dict[str, Any]] = {
    "matrix products alone, {reduced}": {"bound": True, "precision": "reduced"},
    **OURS,
    **PEERS,
}


def main() -> None:
    """Runs the cases, or one contender in a worker process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", choices=CASES, action="append", help="default: gpt2-gpu on CUDA, the others elsewhere"
    )
    parser.add_argument(
        "--only", default="", help="contenders with this name, or with this in it; the others keep their numbers"
    )
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: %(default)s)")
    parser.add_argument("--name", default="train", help="of the report's files (default: %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        try:
            print(json.dumps(work(json.loads(arguments.worker), arguments.device)))
        except GPT2Error as error:
            parser.exit(1, f"{error}\n")
        return
    cases = arguments.case or default_cases(arguments.device)
    chosen = {arguments.only} & set(CONTENDERS) or {name for name in CONTENDERS if arguments.only in name}
    path = REPORT / f"{arguments.name}.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    for case in cases:
        rows = results.get(case, {}).get("rows", [])
        for name, contender in CONTENDERS.items():
            is_known = name == "ours, fp32" and any(row["reduced"] == "fp32" for row in rows)
            if name not in chosen or is_known:
                continue
            command = [sys.executable, "-m", "benchmarks.train", "--device", arguments.device, "--worker"]
            worker = subprocess.run(
                [*command, json.dumps({"case": case, **contender})], stdout=subprocess.PIPE, text=True, check=False
            )
            if worker.returncode:
                print(f"{case}: {name} failed with exit code {worker.returncode}", file=sys.stderr)
                continue
            row = json.loads(worker.stdout.splitlines()[-1])
            row = {"contender": full_name(name, row["reduced"]), **contender, **row}
            rows = [other for other in rows if other["machine"] == row["machine"]]  # numbers of two are not compared
            rows = [*(other for other in rows if other["contender"] != row["contender"]), row]
            print(
                f"{case}: {row['contender']}: {row['tokens_per_s']:,.0f} tokens/s, {row['peak_gb']:.2f} GB", flush=True
            )
        order = [full_name(name, rows[0]["reduced"]) for name in CONTENDERS]
        rows.sort(key=lambda row: order.index(row["contender"]))
        results[case] = {"date": time.strftime("%Y-%m-%d"), "machine": rows[0]["machine"], "rows": rows}
        REPORT.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    write_table(results, arguments.name)
    draw(results, arguments.name)


def full_name(name: str, reduced: str) -> str:
    """The name of a contender in a table. reduced: the dtype that is fastest on the machine."""
    return name.format(reduced=reduced).replace("fp32 autocast", "fp32")


def default_cases(device_name: "DeviceName") -> list[str]:
    """The default cases for a device."""
    from gpt2.device import choose_device

    on_cuda = choose_device(device_name).type == "cuda"
    return ["gpt2-gpu"] if on_cuda else [case for case in CASES if case != "gpt2-gpu"]


def work(contender: dict[str, Any], device_name: "DeviceName") -> dict[str, Any]:
    """Times one contender."""
    import torch

    from gpt2.config import GPT2_VOCAB_SIZE, GPTConfig
    from gpt2.device import (
        PROBE_SIZE,
        choose_device,
        choose_precision,
        configure_device,
        matmul_flops,
        peak_memory_bytes,
    )
    from gpt2.device import device_name as name_of

    device = choose_device(device_name)
    reduced = choose_precision(device, "auto")
    precision = reduced if contender["precision"] == "reduced" else torch.float32
    sizes, batch_size, length, accumulation = CASES[contender["case"]]
    config = GPTConfig(vocab_size=GPT2_VOCAB_SIZE, **sizes)
    torch.manual_seed(0)
    if "peer" not in contender or contender.get("prepared"):
        configure_device(device)  # the other peers run as their users run them
    peak = matmul_flops(device, precision, PROBE_SIZE[device.type])
    draw_tokens = (torch.randint(0, config.vocab_size, (batch_size, length), device=device) for _ in iter(int, 1))
    batches = [(next(draw_tokens), next(draw_tokens)) for _ in range(accumulation)]

    def timed(action: Callable[[], object]) -> float:
        start_s = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start_s

    start_s = time.perf_counter()
    optimizer_seconds: list[float] = []
    vocabulary = None
    if contender.get("text"):
        batches, vocabulary = text_batches(batch_size, length, accumulation, device)
    step = make_step(contender, config, precision, device, batches, optimizer_seconds, vocabulary)
    timed(step)
    set_up_s = time.perf_counter() - start_s
    timed(step)
    seconds = [timed(step), timed(step)]
    while len(seconds) < TIMED_STEPS and sum(seconds) < TIMED_S:
        seconds.append(timed(step))
    tokens = batch_size * length * accumulation
    tokens_per_s = tokens / statistics.median(seconds)
    return {
        "reduced": {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[reduced],
        "machine": f"{name_of(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "tokens_per_s": tokens_per_s,
        "seconds": seconds,
        "set_up_s": set_up_s,
        "peak_flops": peak,
        "mfu": tokens_per_s * (vocabulary.config(config) if vocabulary else config).flops_per_token(length) / peak,
        "peak_gb": peak_memory_bytes(device) / 1e9,
        # on CUDA, the call returns before the work is done
        "optimizer_share": statistics.median(optimizer_seconds[2:]) / statistics.median(seconds)
        if optimizer_seconds and device.type == "cpu"
        else None,
    }


def write_table(results: dict[str, Any], report: str) -> None:
    """Writes the table of a report."""
    lines = [
        "# Training step, side by side",
        "",
        f"Made by `python -m benchmarks.train`; the numbers are in {report}.json.",
    ]
    for case, result in results.items():
        sizes, batch_size, length, accumulation = CASES[case]
        rows = result["rows"]
        best_peer = max((r["tokens_per_s"] for r in rows if "peer" in r), default=None)
        peaks = {p: max(r["peak_flops"] for r in rows if r["precision"] == p) for p in {r["precision"] for r in rows}}
        bound = next((r["tokens_per_s"] for r in rows if r.get("bound")), None)
        lines += [
            "",
            f"## {case}: {sizes['n_layer']} layers x {sizes['n_embd']}, {batch_size} x {length} tokens, "
            f"accumulation {accumulation}",
            "",
            f"{result['machine']}, {result['date']}. MFU is relative to the fastest product of two large "
            "matrices here in the same dtype.",
            "",
            "| | tokens/s | to the best peer | to matrix products alone | MFU | optimizer's share | peak memory, GB "
            "| set-up and first step, s |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {r['contender']} | {r['tokens_per_s']:,.0f} | {beside(r, best_peer, '.2f')} "
            f"| {beside(r, bound, '.0%')} "
            f"| {r['mfu'] * r['peak_flops'] / peaks[r['precision']]:.0%} "
            f"| {f'{share:.1%}' if (share := r.get('optimizer_share')) else ''} "
            f"| {r['peak_gb']:.2f} | {r['set_up_s']:.1f} |"
            for r in rows
        ]
    (REPORT / f"{report}.md").write_text("\n".join(lines) + "\n")


def beside(row: dict[str, Any], tokens_per_s: float | None, form: str) -> str:
    """A row's speed as a multiple of another one; empty if that was not measured."""
    return format(row["tokens_per_s"] / tokens_per_s, form) if tokens_per_s else ""


def draw(results: dict[str, Any], report: str) -> None:
    """Writes the picture of a report."""
    from matplotlib.figure import Figure

    from benchmarks import charts

    figure = Figure(figsize=(9, 2.6 * len(results)), layout="constrained")
    for axes, (case, result) in zip(figure.subplots(len(results), squeeze=False)[:, 0], results.items(), strict=True):
        rows = sorted(result["rows"], key=lambda r: r["tokens_per_s"])
        colors = [charts.BOUND if r.get("bound") else charts.PEER if "peer" in r else charts.OURS for r in rows]
        labels = [f"{r['tokens_per_s']:,.0f}  ({r['peak_gb']:.1f} GB)" for r in rows]
        names, values = [r["contender"] for r in rows], [r["tokens_per_s"] for r in rows]
        charts.draw_bars(axes, names, values, labels, colors, f"{case}: tokens/s (peak memory)")
    figure.savefig(REPORT / f"{report}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
