"""GPUs and what connects them: published data, each with its source.

Peaks, memory and memory bandwidth are those of NVIDIA's data sheets (dense, without sparsity). The model FLOPs
utilization (MFU) of a GPU is measured by others, on models like ours; `docs/scale.md` compares it with each of their
runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gpt2.errors import UserError
from gpt2.memory import GIB

NCCL = "https://github.com/NVIDIA/nccl/blob/5067397c/src/graph"
"""The constants of NCCL's own model of time, of June 2026: tuning.cc (latency), topo.h (bandwidth)."""
RUNPOD = "lowest of RunPod, March 2026: https://deploybase.ai/articles/runpod-gpu-pricing"


@dataclass(frozen=True)
class Link:
    """A connection in the alpha-beta model: a message of n bytes takes latency_s + n / bytes_per_s.

    bytes_per_s: in one direction, for each GPU; with `shared`, for each node. What NCCL reaches, not the line rate.
    between: what it connects. source: where the numbers come from.
    """

    latency_s: float
    bytes_per_s: float
    between: Literal["GPUs", "nodes"]
    source: str
    shared: bool = False


LINKS = {
    "nvlink3": Link(3.4e-6, 220e9, "GPUs", "https://github.com/NVIDIA/nccl-tests/issues/228 (A100)"),
    "nvlink4": Link(3.4e-6, 370e9, "GPUs", "https://github.com/NVIDIA/nccl-tests/issues/212 (H100, rings)"),
    "nvlink5": Link(3.4e-6, 722e9, "GPUs", f"{NCCL}/topo.h: 18 links of 40.1 GB/s (B200)"),
    "pcie4": Link(5.7e-6, 20e9, "GPUs", f"{NCCL}/topo.h: 24 GB/s, of which 1/6 is overhead between GPUs"),
    "pcie3": Link(5.7e-6, 10e9, "GPUs", f"{NCCL}/topo.h: 12 GB/s, of which 1/6 is overhead between GPUs"),
    "pcie3-host": Link(
        5.7e-6,
        3.8e9,
        "GPUs",
        "through the CPU's memory, as in most virtual machines: fitted to seven runs on 2 TITAN RTX, "
        "https://github.com/huggingface/transformers/issues/9371",
    ),
    "infiniband-400": Link(
        14e-6, 48e9, "nodes", "one 400 Gb/s adapter for each GPU, 96% of it: nccl-tests/issues/119 reached that"
    ),
    "infiniband-200": Link(14e-6, 24e9, "nodes", "one 200 Gb/s adapter for each GPU, 96% of it: the same"),
    "ethernet-100": Link(
        50e-6, 5e9, "nodes", "TCP, 4 to 6 GB/s: https://github.com/NVIDIA/nccl/issues/450; latency assumed", shared=True
    ),
    "ethernet-25": Link(
        50e-6, 1.9e9, "nodes", "TCP, 60% of 25 Gb/s: https://github.com/NVIDIA/nccl/issues/209; latency assumed", True
    ),
    "ethernet-10": Link(50e-6, 0.75e9, "nodes", "TCP, 60% of 10 Gb/s: the same", shared=True),
}
"""Latencies within a node and of InfiniBand are NCCL's, for rings and its protocol Simple (tuning.cc)."""
ALIASES = {"infiniband": "infiniband-400", "ethernet": "ethernet-100"}


@dataclass(frozen=True)
class GPU:
    """A GPU in the nodes in which it is usually rented.

    memory_bytes: what training can use. peak_flops: FLOP/s of dense matrix products in bf16 (T4: fp16).
    bytes_per_s: of its memory. mfu: fraction of peak_flops that compiled training reaches, before it waits for others.
    link, network: names in LINKS. node_size: GPUs in a node. dollars_per_hour: for one GPU.
    """

    title: str
    memory_bytes: int
    peak_flops: float
    bytes_per_s: float
    mfu: float
    mfu_source: str
    link: str
    network: str
    node_size: int
    dollars_per_hour: float
    price_source: str


A100_MFU = "measured on A100: 0.60 to 0.64 by llm.c, 0.54 to 0.60 by torchtitan, 0.48 to 0.56 by fms-fsdp"
H100_MFU = "measured on H100: 0.41 to 0.49 by llm.c, 0.39 by torchtitan, 0.37 to 0.40 by modded-nanogpt"
GPUS = {
    "t4": GPU(
        "NVIDIA T4, 16 GB",
        14 * GIB,
        65e12,
        320e9,
        0.25,
        "not measured in training: two thirds of the 24 TFLOP/s that its power limit leaves to matrix products, "
        "https://forums.developer.nvidia.com/t/about-gpu-peak-performance/264462",
        "pcie3-host",
        "ethernet-10",
        4,
        0.35,
        "Google Cloud, 2024; Kaggle and Colab lend it for nothing",
    ),
    "l4": GPU(
        "NVIDIA L4, 24 GB",
        22 * GIB,
        121e12,
        300e9,
        0.44,
        "not measured: that of the H100",
        "pcie4",
        "ethernet-100",
        8,
        0.44,
        RUNPOD,
    ),
    "rtx4090": GPU(
        "NVIDIA RTX 4090, 24 GB",
        22 * GIB,
        165.2e12,
        1008e9,
        0.57,
        "measured on RTX 4090: 0.55 by nanoGPT, 0.57 by llm.c's PyTorch trainer",
        "pcie4",
        "ethernet-25",
        8,
        0.34,
        RUNPOD,
    ),
    "a100-40gb": GPU(
        "NVIDIA A100 SXM, 40 GB",
        37 * GIB,
        312e12,
        1555e9,
        0.57,
        A100_MFU,
        "nvlink3",
        "infiniband-200",
        8,
        1.39,
        RUNPOD + " (80 GB)",
    ),
    "a100": GPU(
        "NVIDIA A100 SXM, 80 GB",
        76 * GIB,
        312e12,
        2039e9,
        0.57,
        A100_MFU,
        "nvlink3",
        "infiniband-200",
        8,
        1.39,
        RUNPOD,
    ),
    "h100": GPU(
        "NVIDIA H100 SXM, 80 GB",
        76 * GIB,
        989e12,
        3350e9,
        0.44,
        H100_MFU,
        "nvlink4",
        "infiniband-400",
        8,
        2.69,
        RUNPOD,
    ),
    "h200": GPU(
        "NVIDIA H200 SXM, 141 GB",
        134 * GIB,
        989e12,
        4800e9,
        0.44,
        H100_MFU + "; the H200 computes with the same chip",
        "nvlink4",
        "infiniband-400",
        8,
        3.59,
        RUNPOD,
    ),
    "b200": GPU(
        "NVIDIA B200, 180 GB",
        171 * GIB,
        2250e12,
        8000e9,
        0.44,
        "not measured: that of the H100",
        "nvlink5",
        "infiniband-400",
        8,
        5.98,
        RUNPOD,
    ),
}


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of GPUs. link: between the GPUs of a node. network: between nodes, used if there is more than one."""

    gpus: int
    node_size: int
    link: Link
    network: Link

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.gpus // self.node_size

    @property
    def network_bytes_per_s(self) -> float:
        """Bandwidth between nodes for each GPU, while all GPUs of a node send."""
        return self.network.bytes_per_s / (self.node_size if self.network.shared else 1)


def find_gpu(name: str) -> GPU:
    """A GPU by its name. Raises UserError for one not in GPUS."""
    if name not in GPUS:
        raise UserError(f"no GPU {name!r}; there are: {', '.join(GPUS)}")
    return GPUS[name]


def interconnect(gpu: GPU, names: Sequence[str]) -> dict[str, str]:
    """The names of the links that are used: between "GPUs" and between "nodes". Those of the GPU if not named.

    Raises UserError for a name not in LINKS, and for two links between the same.
    """
    found = {"GPUs": gpu.link, "nodes": gpu.network}
    named = set()
    for name in names:
        full = gpu.link if name == "nvlink" and gpu.link.startswith("nvlink") else ALIASES.get(name, name)
        if full not in LINKS:
            raise UserError(f"no interconnect {name!r}; there are: {', '.join(LINKS)}")
        between = LINKS[full].between
        if between in named:
            raise UserError(f"two interconnects between {between}: {' '.join(names)}; expected at most one")
        named.add(between)
        found[between] = full
    return found


def build_cluster(gpu: GPU, gpus: int, names: Sequence[str] = (), node_size: int | None = None) -> Cluster:
    """`gpus` GPUs in nodes of node_size, connected by the links of these names.

    node_size: default: that of the GPU, or `gpus` if there are fewer. Raises UserError if the nodes are not full.
    """
    if gpus < 1:
        raise UserError(f"--gpus is {gpus}; expected at least 1")
    if node_size is not None and node_size < 1:
        raise UserError(f"--gpus-per-node is {node_size}; expected at least 1")
    size = min(gpus, node_size or gpu.node_size)
    if gpus % size:
        raise UserError(f"{gpus} GPUs do not fill nodes of {size}; expected a multiple of {size}, or --gpus-per-node")
    used = interconnect(gpu, names)
    return Cluster(gpus, size, LINKS[used["GPUs"]], LINKS[used["nodes"]])
