"""Runs that others published, each with the address of its numbers: what `benchmarks.published` plans."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from gpt2.config import PRESETS
from gpt2.planning.hardware import LINKS
from gpt2.planning.step import Strategy, Workload

GITHUB = "https://github.com"
LLMC = f"{GITHUB}/karpathy/llm.c/blob/f1e2ace6/scripts"
MODDED = f"{GITHUB}/KellerJordan/modded-nanogpt/blob/f411b3d3"
SHORT = f"{MODDED}/records/track_1_short"
TITAN = f"{GITHUB}/pytorch/torchtitan/blob"
H100_TABLES = f"{TITAN}/b5bcd76c/benchmarks/llama3_h100_202412_torchtitan.md"
FMS = f"{GITHUB}/foundation-model-stack/fms-fsdp/blob/0d319983/README.md"


def gpt2(name: str) -> Workload:
    """A GPT-2 of one of OpenAI's sizes with sequences of 1024 tokens."""
    return Workload.of(PRESETS[name], 1024)


def other(blocks: float, outside: float, head: float, n_layer: int, width: int, length: int) -> Workload:
    """Another transformer, from its numbers of parameters: in all blocks, outside of them, and in the head."""
    flops = 6 * (blocks + head) + 12 * n_layer * width * length
    per_block = round(blocks / n_layer)
    return Workload(n_layer, per_block, round(outside), per_block, width, flops)


MODELS = {
    "GPT-2 124M": gpt2("gpt2"),
    "GPT-2 350M": gpt2("gpt2-medium"),
    "GPT-2 774M": gpt2("gpt2-large"),
    "GPT-2 1.5B": gpt2("gpt2-xl"),
    "GPT 1.5B, 52 layers": other(52 * 12 * 1536**2, 50304 * 1536, 50304 * 1536, 52, 1536, 1024),
    "Llama 3.1 8B": other(8.03e9 - 2 * 128256 * 4096, 2 * 128256 * 4096, 128256 * 4096, 32, 4096, 8192),
    "Llama 2 7B": other(6.738e9 - 2 * 32000 * 4096, 2 * 32000 * 4096, 32000 * 4096, 32, 4096, 4096),
    "Llama 2 13B": other(13.02e9 - 2 * 32000 * 5120, 2 * 32000 * 5120, 32000 * 5120, 40, 5120, 4096),
    "GPT 2.8B": other(2.8e9, 0, 0, 34, 2560, 2048),  # its vocabulary is not published
}


@dataclass(frozen=True)
class Published:
    """A run. batch: tokens in a step of all GPUs. micro: tokens at a time on each. tokens_per_s: of all GPUs."""

    who: str
    model: str
    gpu: str
    gpus: int
    strategy: Strategy
    batch: int
    micro: int
    tokens_per_s: float
    source: str
    optimizer: Literal["adamw", "muon"] = "adamw"
    checkpointing: bool = False
    note: str = ""


def by_step(who: str, model: str, gpu: str, batch: int, micro: int, step_s: float, source: str, **kw: Any) -> Published:
    """A run on 8 GPUs with DistributedDataParallel, or nearly (llm.c shards the optimizer state), from its step."""
    return Published(who, model, gpu, 8, "ddp", batch, micro, batch / step_s, source, **kw)


HALF_MILLION, MILLION = 2**19, 2**20
RUNS = [
    by_step("llm.c", "GPT-2 124M", "a100", HALF_MILLION, 2**16, 0.300, f"{LLMC}/run_gpt2_124M.sh"),
    by_step("llm.c", "GPT-2 350M", "a100", HALF_MILLION, 2**16, 0.820, f"{LLMC}/run_gpt2_350M.sh"),
    by_step("llm.c", "GPT-2 774M", "a100", HALF_MILLION, 2**15, 1.7, f"{LLMC}/run_gpt2_774M.sh"),
    by_step("llm.c", "GPT-2 124M", "h100", HALF_MILLION, 2**16, 0.140, f"{SHORT}/2024-10-13_llmc/README.md"),
    by_step(
        "llm.c",
        "GPT-2 350M",
        "h100",
        HALF_MILLION,
        2**16,
        5.8 * 3600 / 60000,
        f"{MODDED}/README.md",
        note="5.8 hours for 60,000 steps",
    ),
    by_step("llm.c", "GPT-2 1.5B", "h100", MILLION, 2**14, 2.80, f"{LLMC}/run_gpt2_1558M.sh"),
    by_step(
        "modded-nanogpt, record 6",
        "GPT-2 124M",
        "h100",
        HALF_MILLION,
        2**16,
        0.15383,
        f"{SHORT}/2024-10-17_DistributedMuon",
        optimizer="muon",
    ),
    by_step(
        "modded-nanogpt, record 7",
        "GPT-2 124M",
        "h100",
        HALF_MILLION,
        2**16,
        0.14182,
        f"{SHORT}/2024-10-18_PyTorch25",
        optimizer="muon",
    ),
    by_step(
        "modded-nanogpt, Adam",
        "GPT-2 124M",
        "h100",
        HALF_MILLION,
        2**16,
        0.13861,
        f"{SHORT}/2024-10-29_Optimizers",
    ),
    by_step(
        "modded-nanogpt, 1.5B",
        "GPT 1.5B, 52 layers",
        "h100",
        480 * 1024,
        12 * 1024,
        1.71966,
        f"{SHORT}/2024-10-20_ScaleUp1B",
        optimizer="muon",
    ),
    Published(
        "torchtitan", "Llama 3.1 8B", "h100", 8, "fsdp", 16 * 8192, 2 * 8192, 8 * 6667, f"{H100_TABLES} (table 1)"
    ),
    Published(
        "torchtitan", "Llama 3.1 8B", "h100", 128, "fsdp", 256 * 8192, 2 * 8192, 128 * 6514, f"{H100_TABLES} (table 3)"
    ),
    Published(
        "torchtitan",
        "Llama 3.1 8B",
        "a100",
        64,
        "fsdp",
        64 * 8192,
        8192,
        64 * 2904,
        f"{TITAN}/4d88a8a44/docs/performance.md",
    ),
    Published(
        "torchtitan",
        "Llama 2 13B",
        "a100",
        64,
        "fsdp",
        128 * 4096,
        2 * 4096,
        64 * 2162,
        f"{TITAN}/3faaa1a0d/docs/performance.md",
    ),
    Published("fms-fsdp", "Llama 2 7B", "a100", 128, "fsdp", 256 * 4096, 2 * 4096, 128 * 3760, FMS),
    Published("fms-fsdp", "Llama 2 13B", "a100", 128, "fsdp", 128 * 4096, 4096, 128 * 1700, FMS),
    by_step(
        "GPT-Simple",
        "GPT 2.8B",
        "a100",
        HALF_MILLION,
        4 * 2048,
        HALF_MILLION / 65000,
        "https://lb-off.github.io/gpt-simple/performance/",
        checkpointing=True,
    ),
    Published(
        "nanoGPT",
        "GPT-2 124M",
        "rtx4090",
        1,
        "ddp",
        40 * 12 * 1024,
        12 * 1024,
        40 * 12 * 1024 / 4.620,
        f"{GITHUB}/karpathy/nanoGPT/pull/225",
    ),
    Published(
        "llm.c, PyTorch",
        "GPT-2 124M",
        "rtx4090",
        2,
        "ddp",
        2**18,
        2**14,
        220700,
        "https://tylerromero.com/posts/nanogpt-speedrun-worklog",
        note="the micro-batch is not published",
    ),
]
SLOWER = [
    by_step(
        "modded-nanogpt, record 2",
        "GPT-2 124M",
        "h100",
        HALF_MILLION,
        2**16,
        31.4 * 60 / 9536,
        f"{MODDED}/README.md",
        note="PyTorch before 2.5",
    ),
    by_step(
        "modded-nanogpt, record 4",
        "GPT-2 124M",
        "h100",
        HALF_MILLION,
        2**16,
        0.21633,
        f"{SHORT}/2024-10-10_Muon",
        optimizer="muon",
        note="every GPU orthogonalized everything; PyTorch before 2.5",
    ),
    by_step(
        "modded-nanogpt, record 5",
        "GPT-2 124M",
        "h100",
        HALF_MILLION,
        2**16,
        0.17889,
        f"{SHORT}/2024-10-14_ModernArch",
        optimizer="muon",
        note="the same",
    ),
    Published(
        "torchtitan",
        "Llama 3.1 8B",
        "h100",
        8,
        "fsdp",
        16 * 8192,
        2 * 8192,
        8 * 5762,
        f"{H100_TABLES} (table 1)",
        note="without torch.compile",
    ),
    by_step(
        "nanoGPT",
        "GPT-2 124M",
        "a100",
        40 * 12 * 1024,
        12 * 1024,
        0.562,
        f"{GITHUB}/karpathy/nanoGPT/issues/110",
        note="a nightly build of PyTorch 2.0, February 2023",
    ),
    by_step(
        "build-nanogpt",
        "GPT-2 124M",
        "a100",
        HALF_MILLION,
        2**16,
        HALF_MILLION / 1.1e6,
        "https://debtirthasaha.github.io/blog/2026/gpt2-124m/",
        note="127 steps a minute, as its author reports",
    ),
]
COSTS = [  # who, model, GPU, tokens of a step, steps, $ per GPU and hour, published hours and dollars
    ("GPT-2 124M", "a100", HALF_MILLION, 18865, 14 / 8, 94.3 / 60, 20, f"{LLMC}/run_gpt2_124M.sh"),
    ("GPT-2 350M", "a100", HALF_MILLION, 60000, 14 / 8, 13.7, 200, f"{LLMC}/run_gpt2_350M.sh"),
    ("GPT-2 774M", "a100", HALF_MILLION, 286102, 14 / 8, 135, 2000, f"{LLMC}/run_gpt2_774M.sh"),
    ("GPT-2 1.5B", "h100", MILLION, 32000, 28 / 8, 24, 672, f"{LLMC}/run_gpt2_1558M.sh"),
]
TWO_GPUS = f"{GITHUB}/huggingface/transformers/issues/9371"
# Preset, tokens in a sequence, seconds of 400 steps of 4 sequences on one TITAN RTX, and of 200 steps on each of two:
# with NVLink, and without it and without P2P.
PAIRS = [
    ("gpt2", 128, 19.5621, 13.5368, 30.0181),
    ("gpt2", 256, 30.4230, 18.6943, 35.4208),
    ("gpt2", 512, 58.0856, 32.3616, 49.1999),
    ("gpt2-medium", 128, 49.3823, 33.4365, 74.9924),
    ("gpt2-medium", 256, 79.6724, 47.7543, 89.3616),
    ("gpt2-medium", 512, 152.6255, 82.1935, 124.1163),
    ("gpt2-large", 128, 98.5939, 65.7918, 152.2178),
]
TWO_NVLINKS = replace(LINKS["nvlink3"], bytes_per_s=2 * 20e9)
"""Between the two TITAN RTX: 2 links of 20 GB/s, as in NCCL's topo.h."""
