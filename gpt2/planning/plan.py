"""Which strategy and micro-batch: memory of each device, tokens/s, hours and dollars."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gpt2.config import GPTConfig
from gpt2.errors import UserError
from gpt2.memory import training_bytes
from gpt2.planning.hardware import GPU, Cluster
from gpt2.planning.step import BF16, FP32, STRATEGIES, StepTime, Strategy, Work, Workload, step_time

REPLICATED_BYTES = 18
"""For each parameter in `gpt2.memory.training_bytes`: weight, gradient, two moments in fp32, and the bf16 copy."""
MARGIN = 0.02
"""A difference in speed that the model cannot tell."""


@dataclass(frozen=True)
class Run:
    """What is to be trained. batch_size: sequences in a step, of all GPUs together. tokens: in the whole run."""

    config: GPTConfig
    batch_size: int
    sequence_length: int
    tokens: float
    optimizer: Literal["adamw", "muon"]

    @property
    def batch_tokens(self) -> int:
        """Tokens in a step."""
        return self.batch_size * self.sequence_length


@dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    weights: float
    gradients: float
    optimizer_state: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer_state + self.activations


@dataclass(frozen=True)
class Plan:
    """A way to train. micro_batch: sequences of one GPU at a time; 0 if the model does not fit, and then no times.

    efficiency: fraction of the step in which a GPU does not wait for communication. mfu: of the whole step.
    """

    strategy: Strategy
    checkpointing: bool
    micro_batch: int
    micro_batches: int
    memory: Memory
    time: StepTime | None
    tokens_per_s: float = 0.0
    efficiency: float = 0.0
    mfu: float = 0.0
    hours: float = float("inf")
    dollars: float = float("inf")


def memory_per_device(
    run: Run, strategy: Strategy, gpus: int, micro_batch: int, *, checkpointing: bool = False
) -> Memory:
    """Memory of each device.

    ddp: all of weights (fp32 and the bf16 copy), gradients and optimizer state. fsdp: 1/p of them in fp32, and as a
    whole in bf16 the embeddings, two blocks (one in use, one prefetched), and the largest gradient in bf16 and fp32.
    """
    workload = Workload.of(run.config, run.sequence_length)
    parameters = workload.parameters
    everything = training_bytes(
        run.config,
        micro_batch,
        run.sequence_length,
        reduced_precision=True,
        gradient_checkpointing=checkpointing,
        on_cpu=False,
    )
    activations = everything - REPLICATED_BYTES * parameters
    state: float = 2 * FP32 * parameters
    if run.optimizer == "muon":  # one momentum in place of two moments
        state -= FP32 * workload.n_layer * workload.block_matrices
    if strategy == "ddp" or gpus == 1:
        return Memory((FP32 + BF16) * parameters, FP32 * parameters, state, activations)
    block, other = workload.block_parameters, workload.other_parameters
    weights = FP32 * parameters / gpus + BF16 * (2 * block + other)
    gradients = FP32 * parameters / gpus + (BF16 + FP32) * max(block, other)
    return Memory(weights, gradients, state / gpus, activations)


def plan(
    run: Run, gpu: GPU, cluster: Cluster, *, strategy: Strategy, flops_per_s: float, dollars_per_hour: float
) -> Plan:
    """The plan of one strategy, with the largest micro-batch that fits.

    With gradient checkpointing where that is faster: FSDP then communicates for larger micro-batches, less often.
    flops_per_s: what a GPU reaches. Raises UserError if the GPUs do not divide the batch.
    """
    per_gpu = sequences_per_gpu(run, cluster.gpus)
    workload = Workload.of(run.config, run.sequence_length)
    found = []
    for checkpointing in (False, True):
        micro_batch, memory = _largest_micro_batch(run, gpu, cluster, strategy, checkpointing=checkpointing)
        if not micro_batch:
            continue
        micro_batches, tokens = per_gpu // micro_batch, micro_batch * run.sequence_length
        work = Work(tokens, micro_batches, flops_per_s, gpu.bytes_per_s, run.optimizer, checkpointing)
        time = step_time(strategy, workload, work, cluster)
        tokens_per_s = run.batch_tokens / time.total_s
        hours = run.tokens / tokens_per_s / 3600
        found.append(
            Plan(
                strategy,
                checkpointing,
                micro_batch,
                micro_batches,
                memory,
                time,
                tokens_per_s,
                efficiency=1 - time.exposed_s / time.total_s,
                mfu=workload.flops_per_token * tokens_per_s / cluster.gpus / gpu.peak_flops,
                hours=hours,
                dollars=hours * cluster.gpus * dollars_per_hour,
            )
        )
    least = memory_per_device(run, strategy, cluster.gpus, 1, checkpointing=True)
    return best(found) or Plan(strategy, True, 0, 0, least, None)


def _largest_micro_batch(
    run: Run, gpu: GPU, cluster: Cluster, strategy: Strategy, *, checkpointing: bool
) -> tuple[int, Memory]:
    """The largest micro-batch that divides the sequences of a GPU and fits, and its memory; 0 if none fits."""
    for micro_batch in divisors(sequences_per_gpu(run, cluster.gpus)):
        memory = memory_per_device(run, strategy, cluster.gpus, micro_batch, checkpointing=checkpointing)
        if memory.total <= gpu.memory_bytes:
            return micro_batch, memory
    return 0, memory


def plans(run: Run, gpu: GPU, cluster: Cluster, *, flops_per_s: float, dollars_per_hour: float) -> list[Plan]:
    """The plan of each strategy; of one GPU there is nothing to shard."""
    strategies = STRATEGIES if cluster.gpus > 1 else STRATEGIES[:1]
    return [
        plan(run, gpu, cluster, strategy=each, flops_per_s=flops_per_s, dollars_per_hour=dollars_per_hour)
        for each in strategies
    ]


def best(found: Sequence[Plan]) -> Plan | None:
    """The first plan that nearly has the most tokens/s of those that fit; None if none fits.

    So ddp is preferred, which `runtime.strategy: auto` takes wherever it fits, unless fsdp gains more than MARGIN.
    """
    fitting = [each for each in found if each.micro_batch]
    most = max((each.tokens_per_s for each in fitting), default=0.0)
    return next((each for each in fitting if each.tokens_per_s * (1 + MARGIN) >= most), None)


def sequences_per_gpu(run: Run, gpus: int) -> int:
    """Sequences of a step for each GPU. Raises UserError unless the GPUs divide the batch."""
    if run.batch_size % gpus:
        below = run.batch_size // gpus * gpus
        nearest = " or ".join(f"{n:,}" for n in (below, below + gpus) if n)
        raise UserError(
            f"{gpus} GPUs do not divide a batch of {run.batch_size:,} sequences; "
            f"expected a multiple of {gpus}, such as {nearest}"
        )
    return run.batch_size // gpus


def divisors(number: int) -> list[int]:
    """The divisors of a number, the largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]
