"""The bytes that DDP and FSDP send in a training step, beside those of the alpha-beta model.

    python -m benchmarks.communication    a minute

Trains a tiny GPT in 2 and 4 processes on this machine, over gloo, with torch's own DistributedDataParallel and
fully_shard (on each block; bf16 weights, fp32 gradients). Each process counts what it writes to its sockets: `wchar` in
/proc/self/io, which counts every write call of this process alone, without the headers of TCP. Counters of the network
interface would also count the other processes of the machine. Writes reports/benchmarks/communication.{json,md}.
"""

import json
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from gpt2.config import GPTConfig
from gpt2.planning.communication import all_reduce_sent
from gpt2.planning.step import FP32, STRATEGIES, Strategy, Workload, bytes_sent

REPORT = Path("reports/benchmarks")
CONFIG = GPTConfig(block_size=64, vocab_size=1024, n_layer=4, n_head=4, n_embd=128)
PROCESSES = (2, 4)
MICRO_BATCHES = (1, 2)
WARM_UP, STEPS = 3, 3
BATCH_SIZE = 2


def main() -> None:
    """Measures all, and writes the report."""
    import torch

    rows = [
        measure(strategy, processes, micro_batches)
        for strategy in STRATEGIES
        for processes in PROCESSES
        for micro_batches in MICRO_BATCHES
    ]
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "config": CONFIG.to_dict(),
        "parameters": CONFIG.num_parameters(),
        "rows": rows,
    }
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / "communication.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    (REPORT / "communication.md").write_text(text)
    print(text)


def measure(strategy: Strategy, processes: int, micro_batches: int) -> dict[str, Any]:
    """Bytes that a process sends in a step: measured (mean and spread over the processes) and computed."""
    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory() as folder:
        spawn(train, args=(processes, strategy, micro_batches, folder), nprocs=processes)  # type: ignore[no-untyped-call]
        sent = [float(Path(folder, f"{rank}.txt").read_text()) for rank in range(processes)]
    workload = Workload.of(CONFIG, CONFIG.block_size)
    model = bytes_sent(strategy, workload, micro_batches, processes)
    mean, total = sum(sent) / processes, sum(model.values())
    # gloo's reduce-scatter is an all-reduce of which each process keeps its part
    gloo = dict(model)
    if "reduce-scatter" in gloo:
        gloo["reduce-scatter"] = micro_batches * all_reduce_sent(FP32 * workload.parameters, processes)
    return {
        "strategy": strategy,
        "processes": processes,
        "micro_batches": micro_batches,
        "measured": mean,
        "spread": (max(sent) - min(sent)) / mean,
        "rings": total,
        "gloo": sum(gloo.values()),
        "by_collective": model,
    }


def train(rank: int, processes: int, strategy: Strategy, micro_batches: int, folder: str) -> None:
    """A process: trains, and writes to `folder` how many bytes it sent in a step."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from gpt2.model.transformer import GPT

    warnings.simplefilter("ignore", FutureWarning)  # of torch, about names inside of torch
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    torch.manual_seed(0)
    model: Any = GPT(CONFIG)
    if strategy == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (processes,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model.transformer["h"]:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, CONFIG.vocab_size, (BATCH_SIZE, CONFIG.block_size + 1))

    def step() -> None:
        for number in range(micro_batches):
            is_last = number == micro_batches - 1
            with model.no_sync() if strategy == "ddp" and not is_last else nullcontext():
                model(tokens[:, :-1], tokens[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARM_UP):
        step()
    dist.barrier()
    before = written()
    for _ in range(STEPS):
        step()
    sent = (written() - before) / STEPS
    dist.barrier()
    Path(folder, f"{rank}.txt").write_text(str(sent))
    dist.destroy_process_group()


def written() -> int:
    """Bytes of all write calls of this process so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.removeprefix("wchar: ") for line in lines if line.startswith("wchar: ")))


def table(results: dict[str, Any]) -> str:
    """reports/benchmarks/communication.md."""
    lines = [
        "# Bytes sent in a step",
        "",
        f"Made by `python -m benchmarks.communication` over gloo, torch {results['torch']}, {results['date']}. "
        f"A GPT with {results['parameters']:,} parameters. Bytes that each process sends in a step; the processes "
        "differ by less than 0.1%.",
        "",
        "| strategy | processes | micro-batches | measured | model | measured / model | model of gloo | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        measured, rings, gloo = row["measured"], row["rings"], row["gloo"]
        lines.append(
            f"| {row['strategy']} | {row['processes']} | {row['micro_batches']} | {measured:,.0f} | {rings:,.0f} | "
            f"{measured / rings:.3f} | {gloo:,.0f} | {measured / gloo:.3f} |"
        )
    lines += [
        "",
        "The model counts rings, as NCCL sends them. gloo has no ring for reduce-scatter: it makes an all-reduce and "
        "keeps a part, which is twice as much. The model of gloo counts it so.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
