"""Training in two processes beside one, and beside nanoGPT's way, on this machine's CPU: tokens/s of all processes.

    python -m benchmarks.distributed                 three quarters of an hour on two cores
    python -m benchmarks.distributed --rounds 1      a quarter of an hour

GPT-2 124M, a global batch of 2 x 32 sequences of 128 tokens, compiled, in bf16 where that is faster. Contenders run one
after the other, in rounds; the result is the median step of all rounds. `saves` is how long a checkpoint of two
processes holds up training: written at once, and in the background. Writes reports/benchmarks/distributed.{json,md}.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

REPORT = Path("reports/benchmarks")
BATCH_SIZE, LENGTH, ACCUMULATION = 32, 128, 2
STEPS = 4
CORES = 2
CONTENDERS: dict[str, dict[str, Any]] = {
    "one process": {"processes": 1},
    "two processes, ddp": {"processes": 2, "strategy": "ddp"},
    "two processes, fsdp": {"processes": 2, "strategy": "fsdp"},
    "one process, Muon": {"processes": 1, "optimizer": "muon"},
    "two processes, ddp, Muon": {"processes": 2, "strategy": "ddp", "optimizer": "muon"},
    "two processes, ddp, Muon, not divided": {
        "processes": 2,
        "strategy": "ddp",
        "optimizer": "muon",
        "is_divided": False,
    },
    "two processes, fsdp, Muon": {"processes": 2, "strategy": "fsdp", "optimizer": "muon"},
    "two processes, fsdp, Muon, not divided": {
        "processes": 2,
        "strategy": "fsdp",
        "optimizer": "muon",
        "is_divided": False,
    },
    "two processes, nanoGPT's way": {"processes": 2, "peer": True},
    "two processes, nanoGPT's way, our allocator settings": {"processes": 2, "peer": True, "prepared": True},
}


def main() -> None:
    """Runs all contenders, or is a process of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--only", default="", help="contenders with this in their name; the others keep their numbers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        contender = json.loads(arguments.worker)
        found = time_saves() if contender.get("saves") else time_steps(contender)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found), flush=True)
        os._exit(0)  # gloo's threads may abort the process at an ordinary exit
    file = REPORT / "distributed.json"
    results = json.loads(file.read_text()) if file.is_file() and arguments.only else {}
    for _ in range(arguments.rounds):
        for name, contender in CONTENDERS.items():
            if arguments.only in name:
                row = run(contender)
                results.setdefault("seconds", {}).setdefault(name, []).extend(row["seconds"])
                results["machine"] = row["machine"]
                print(f"{name}: {speed(row['seconds']):,.0f} tokens/s", flush=True)
                write(results)
    if not arguments.only:
        results["saves"] = run({"processes": 2, "saves": True})
        write(results)


def write(results: dict[str, Any]) -> None:
    """Writes both files, after each contender."""
    results["date"] = time.strftime("%Y-%m-%d")
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / "distributed.json").write_text(json.dumps(results, indent=1) + "\n")
    write_table(results)


def run(contender: dict[str, Any]) -> dict[str, Any]:
    """The outcome of a contender, in its processes."""
    program = ["-m", "benchmarks.distributed", "--worker", json.dumps(contender)]
    count = contender["processes"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    done = subprocess.run([sys.executable, *launcher, *program], stdout=subprocess.PIPE, text=True, check=True)
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def speed(seconds: list[float]) -> float:
    """Tokens/s of all processes, from the seconds of steps."""
    return BATCH_SIZE * LENGTH * ACCUMULATION / statistics.median(seconds)


def settings(contender: dict[str, Any]) -> Any:
    """The TrainConfig of our contenders."""
    from gpt2.config import TrainConfig

    ones = dict.fromkeys((field.name for field in fields(TrainConfig)), 1)
    return TrainConfig(
        **ones
        | {
            "batch_size": BATCH_SIZE,
            "gradient_accumulation_steps": ACCUMULATION,
            "optimizer": contender.get("optimizer", "adamw"),
            "learning_rate": 1e-4,
            "muon_learning_rate": 1e-3,
            "min_learning_rate": 0.0,
            "warmup_steps": 0,
            "weight_decay": 0.1,
            "beta1": 0.9,
            "beta2": 0.95,
            "dropout": 0.0,
            "freeze_layers": 0,
            "label_smoothing": 0.0,
            "min_token_count": 0,
        }  # type: ignore[arg-type]
    )


def time_steps(contender: dict[str, Any]) -> dict[str, Any]:
    """The seconds of a few steps, in each process of a contender."""
    import torch

    from gpt2.config import PRESETS
    from gpt2.device import choose_precision, configure_device, device_name
    from gpt2.world import ALONE, join

    world = join("cpu") if contender["processes"] > 1 else ALONE
    device = torch.device("cpu")
    torch.set_num_threads(CORES // world.size)
    if not contender.get("peer") or contender.get("prepared"):
        configure_device(device)
    precision = world.from_first(choose_precision(device, "auto"))
    torch.manual_seed(0)
    config = settings(contender).share(world.size)
    shape = (config.batch_size, LENGTH)
    tokens = [torch.randint(0, PRESETS["gpt2"].vocab_size, shape) for _ in range(config.gradient_accumulation_steps)]
    batches = [(part, part.roll(-1, 1)) for part in tokens]
    make = peer_step if contender.get("peer") else our_step
    step = make(contender, world, precision, batches)
    step()
    seconds = []
    for _ in range(STEPS):
        start_s = time.perf_counter()
        step()
        world.any(False)
        seconds.append(time.perf_counter() - start_s)
    kind = str(precision).removeprefix("torch.")
    return {"seconds": seconds, "machine": f"{device_name(device)}, {kind}, torch {torch.__version__}"}


def our_step(contender: dict[str, Any], world: Any, precision: Any, batches: Any) -> Callable[[], None]:
    """The optimizer step of gpt2.training.trainer."""
    from gpt2.config import PRESETS
    from gpt2.distributed import parts
    from gpt2.model.transformer import GPT
    from gpt2.optimizers.optimizer import Optimizer

    strategy = contender.get("strategy", "ddp")
    model = parts.make_model(GPT(PRESETS["gpt2"]), precision, world, strategy, gradient_checkpointing=False)
    config = settings(contender)
    is_divided = contender.get("is_divided", True)
    optimizer = (
        parts.make_optimizer(model, config, world) if is_divided else Optimizer(model.master, config, dtype=precision)
    )
    model.compile(*batches[0][0].shape)
    model.warm_up(*batches[0][0].shape)

    def step() -> None:
        for number, (inputs, targets) in enumerate(batches, 1):
            with model.gradient_sync(is_last=number == len(batches)):
                (model.loss(inputs, targets) / len(batches)).backward()  # type: ignore[no-untyped-call]
        world.mean(model.clip_grad_norm(1.0).item())
        optimizer.step()
        model.cast_weights()
        optimizer.zero_grad()

    return step


def peer_step(contender: dict[str, Any], world: Any, precision: Any, batches: Any) -> Callable[[], None]:
    """The step of a nanoGPT-style script: autocast, torch.compile, DDP that averages after the last micro-batch."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from benchmarks.plain import PlainGPT
    from gpt2.config import PRESETS

    model = PlainGPT(PRESETS["gpt2"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    module = DistributedDataParallel(torch.compile(model))
    autocast = torch.autocast("cpu", precision) if precision != torch.float32 else contextlib.nullcontext()

    def step() -> None:
        for number, (inputs, targets) in enumerate(batches, 1):
            module.require_backward_grad_sync = number == len(batches)
            with autocast:
                loss = module(inputs, targets) / len(batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def time_saves() -> dict[str, Any]:
    """Seconds that saves of a sharded model hold up training: whole saves, and the copies for those in background."""
    import torch

    from gpt2.config import PRESETS
    from gpt2.device import configure_device
    from gpt2.distributed import parts
    from gpt2.model.transformer import GPT
    from gpt2.training.checkpoints import CheckpointStore
    from gpt2.training.state import TrainState, checkpoint_content
    from gpt2.world import join

    world = join("cpu")
    torch.set_num_threads(CORES // world.size)
    configure_device(torch.device("cpu"))
    model = parts.make_model(GPT(PRESETS["gpt2"]), torch.float32, world, "fsdp", gradient_checkpointing=False)
    optimizer = parts.make_optimizer(model, settings({}), world)
    optimizer.initialize_state()
    state = TrainState.initial(torch.float32, BATCH_SIZE)
    folder = Path(world.from_first(tempfile.mkdtemp(prefix="gpt2-saves-") if world.rank == 0 else None))
    store = CheckpointStore(folder, world)
    writer = parts.make_writer(store, optimizer, world, torch.device("cpu"))
    found: dict[str, list[float]] = {"whole": [], "in background": []}
    for number in range(1, 9):
        state.step = number
        content = checkpoint_content(model.master, optimizer, state, world)
        world.any(False)
        start_s = time.perf_counter()
        writer.save(number, content, last=number % 2 == 1)
        found["whole" if number % 2 else "in background"].append(time.perf_counter() - start_s)
        if number % 2 == 0:
            writer.save(number, content, last=True)  # waits
    if world.rank == 0:
        store.prune(keep=0)
    return {name: seconds[1:] for name, seconds in found.items()}  # the first ones allocate


def write_table(results: dict[str, Any]) -> None:
    """Writes reports/benchmarks/distributed.md."""
    speeds = {name: speed(seconds) for name, seconds in results["seconds"].items()}
    peer = max((value for name, value in speeds.items() if "nanoGPT" in name), default=float("nan"))
    lines = [
        "# Two processes beside one",
        "",
        "Made by `python -m benchmarks.distributed`; the numbers are in distributed.json.",
        "",
        f"{results['machine']}, {results['date']}. GPT-2 124M, {ACCUMULATION} x {BATCH_SIZE} x {LENGTH} tokens a step. "
        f"One process has {CORES} threads, two have one each.",
        "",
        "| | tokens/s | to one process | to nanoGPT's way at its best |",
        "|---|---:|---:|---:|",
    ]
    for name, value in speeds.items():
        alone = speeds.get("one process, Muon" if "Muon" in name else "one process", float("nan"))
        lines.append(f"| {name} | {value:,.0f} | {value / alone:.2f} | {value / peer:.2f} |")
    saves = {name: statistics.median(seconds) for name, seconds in results.get("saves", {}).items()}
    if saves:
        share = saves["in background"] / saves["whole"]
        lines += [
            "",
            f"A checkpoint of two FSDP processes takes {saves['whole']:.2f} s as a whole. In the background it holds "
            f"training up for {saves['in background']:.2f} s ({share:.0%}).",
        ]
    (REPORT / "distributed.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
