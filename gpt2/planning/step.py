"""The time of a training step on several GPUs, by strategy.

The strategies are those of torch. "ddp", DistributedDataParallel (https://arxiv.org/abs/2006.15704): every process has
all weights; one fp32 all-reduce of the gradients in each step, beside the last backward pass. "fsdp", fully_shard on
each block (https://arxiv.org/abs/2304.11277): weights are gathered in bf16 before each forward and backward pass of a
block, and its gradients reduce-scattered in fp32, in each micro-batch, beside the computation of the next block.
"""

from dataclasses import dataclass
from typing import Literal

from gpt2.config import GPTConfig
from gpt2.planning.communication import (
    all_gather_s,
    all_gather_sent,
    all_reduce_s,
    all_reduce_sent,
    reduce_scatter_s,
)
from gpt2.planning.hardware import Cluster

Strategy = Literal["ddp", "fsdp"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp")
FP32, BF16 = 4, 2
BUCKET_BYTES = 25 * 2**20
"""torch's DistributedDataParallel sends gradients in buckets of this size."""
NEWTON_SCHULZ_STEPS = 5
ADAMW_TRAFFIC, MUON_TRAFFIC = 30, 22
"""Bytes of memory read and written for each parameter: weight, gradient, moments in fp32, and the bf16 copy."""


@dataclass(frozen=True)
class Workload:
    """What a model asks of a cluster.

    block_parameters: of one block. other_parameters: of embeddings, head and last norm. block_matrices: parameters of
    a block that Muon trains. width: n_embd. flops_per_token: forward and backward, without recomputation.
    """

    n_layer: int
    block_parameters: int
    other_parameters: int
    block_matrices: int
    width: int
    flops_per_token: float

    @classmethod
    def of(cls, config: GPTConfig, sequence_length: int) -> "Workload":
        """The workload of a GPT-2."""
        C = config.n_embd
        block = 12 * C * C + 13 * C
        other = config.num_parameters() - config.n_layer * block
        return cls(config.n_layer, block, other, 12 * C * C, C, config.flops_per_token(sequence_length))

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return self.n_layer * self.block_parameters + self.other_parameters

    def newton_schulz_flops(self) -> float:
        """FLOPs of Muon's orthogonalization of all matrices of the blocks.

        An iteration on m x n, m <= n, takes 4 m^2 n + 2 m^3: https://kellerjordan.github.io/posts/muon/. The matrices
        of a block are C x 3C, C x C and twice C x 4C.
        """
        per_block = sum(4 * n + 2 for n in (3, 1, 4, 4)) * self.width**3
        return NEWTON_SCHULZ_STEPS * self.n_layer * float(per_block)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. communication_s: of all collectives. exposed_s: of it, what computation does not hide."""

    compute_s: float
    communication_s: float
    exposed_s: float
    optimizer_s: float

    @property
    def total_s(self) -> float:
        """Seconds from step to step."""
        return self.compute_s + self.exposed_s + self.optimizer_s


@dataclass(frozen=True)
class Work:
    """The part of a step that one GPU does.

    micro_batch_tokens: in each of micro_batches. flops_per_s: what the GPU reaches. checkpointing: the forward pass
    is computed twice, which is a third more work.
    """

    micro_batch_tokens: int
    micro_batches: int
    flops_per_s: float
    bytes_per_s: float
    optimizer: Literal["adamw", "muon"] = "adamw"
    checkpointing: bool = False

    def forward_s(self, workload: Workload) -> float:
        """Seconds of a forward pass of a micro-batch: a third of the FLOPs."""
        return workload.flops_per_token * self.micro_batch_tokens / 3 / self.flops_per_s

    def backward_s(self, workload: Workload) -> float:
        """Seconds of a backward pass of a micro-batch."""
        return self.forward_s(workload) * (3 if self.checkpointing else 2)


def step_time(strategy: Strategy, workload: Workload, work: Work, cluster: Cluster) -> StepTime:
    """The time of a step by one strategy. A single GPU communicates nothing."""
    compute_s = work.micro_batches * (work.forward_s(workload) + work.backward_s(workload))
    optimizer_s = _optimizer_s(strategy, workload, work, cluster)
    if cluster.gpus == 1:
        return StepTime(compute_s, 0.0, 0.0, optimizer_s)
    communicate = _ddp if strategy == "ddp" else _fsdp
    communication_s, exposed_s = communicate(workload, work, cluster)
    exchange_s = _exchange_s(strategy, workload, work, cluster)
    return StepTime(compute_s, communication_s + exchange_s, exposed_s + exchange_s, optimizer_s)


def bytes_sent(strategy: Strategy, workload: Workload, micro_batches: int, processes: int) -> dict[str, float]:
    """Bytes that each process sends in a step, by collective, without those of the optimizer."""
    if strategy == "ddp":
        return {"all-reduce": all_reduce_sent(FP32 * workload.parameters, processes)}
    blocks = workload.n_layer * workload.block_parameters
    gathered = BF16 * (2 * blocks + workload.other_parameters)  # what is outside of the blocks is gathered once
    return {
        "all-gather": micro_batches * all_gather_sent(gathered, processes),
        "reduce-scatter": micro_batches * all_gather_sent(FP32 * workload.parameters, processes),
    }


def _ddp(workload: Workload, work: Work, cluster: Cluster) -> tuple[float, float]:
    """Seconds of communication, and of it what is not beside the last backward pass.

    The tied embedding has its gradient only at the end of the backward pass: nothing hides its all-reduce.
    """
    blocks = _bucketed_s(FP32 * workload.n_layer * workload.block_parameters, cluster)
    last = _bucketed_s(FP32 * workload.other_parameters, cluster)
    return blocks + last, last + max(0.0, blocks - work.backward_s(workload))


def _bucketed_s(count: float, cluster: Cluster) -> float:
    buckets = max(1, round(count / BUCKET_BYTES))
    return buckets * all_reduce_s(count / buckets, cluster)


def _fsdp(workload: Workload, work: Work, cluster: Cluster) -> tuple[float, float]:
    """Seconds of communication, and of it what is not beside the computation of another block.

    The first gather and the last reduce-scatter of a micro-batch, those of the embeddings, have nothing to hide behind.
    """
    gather_s = all_gather_s(BF16 * workload.block_parameters, cluster)
    scatter_s = reduce_scatter_s(FP32 * workload.block_parameters, cluster)
    ends_s = all_gather_s(BF16 * workload.other_parameters, cluster)
    ends_s += reduce_scatter_s(FP32 * workload.other_parameters, cluster)
    layers = workload.n_layer
    forward_s, backward_s = work.forward_s(workload) / layers, work.backward_s(workload) / layers
    exposed_s = ends_s + layers * (max(0.0, gather_s - forward_s) + max(0.0, gather_s + scatter_s - backward_s))
    communication_s = ends_s + layers * (2 * gather_s + scatter_s)
    return work.micro_batches * communication_s, work.micro_batches * exposed_s


def _optimizer_s(strategy: Strategy, workload: Workload, work: Work, cluster: Cluster) -> float:
    """Reading and writing memory; with Muon also the orthogonalization, which is divided among all GPUs."""
    parameters = workload.parameters / (cluster.gpus if strategy == "fsdp" else 1)
    if work.optimizer == "adamw":
        return ADAMW_TRAFFIC * parameters / work.bytes_per_s
    orthogonalization_s = workload.newton_schulz_flops() / cluster.gpus / work.flops_per_s
    return MUON_TRAFFIC * parameters / work.bytes_per_s + orthogonalization_s


def _exchange_s(strategy: Strategy, workload: Workload, work: Work, cluster: Cluster) -> float:
    """Muon's exchange in bf16: the updates are gathered; shards also have to be put together before."""
    if work.optimizer == "adamw":
        return 0.0
    exchanges = 1 if strategy == "ddp" else 2
    return exchanges * all_gather_s(BF16 * workload.n_layer * workload.block_matrices, cluster)
