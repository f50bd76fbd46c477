"""Estimates of training memory, from the sizes of a model and its batch."""

from gpt2.config import GPTConfig

GIB = 2**30
PROCESS_BYTES = 450_000_000
"""Memory of Python and torch in a process that trains on a CPU."""
HEAP_OVERHEAD = 1.15
"""Ratio of the heap's size to the memory in use on a CPU; measured, see `python -m benchmarks.train`."""
CHUNK_TOKENS = 512
MACHINES = {"2-core laptop, 8 GB": 6 * GIB, "T4, 16 GB": 14 * GIB, "GPU, 24 GB": 22 * GIB, "GPU, 80 GB": 76 * GIB}
"""Memory for training on common machines."""


def training_bytes(
    config: GPTConfig,
    batch_size: int,
    sequence_length: int,
    *,
    reduced_precision: bool,
    gradient_checkpointing: bool = False,
    on_cpu: bool = True,
    dropout: bool = False,
    freeze_layers: int = 0,
) -> int:
    """Estimated peak memory of training with AdamW on micro-batches of this size.

    reduced_precision: matrix products in bf16 or fp16. Per parameter: weight, gradient and two moments in fp32, and the
    compute copy. Per token and layer: the residual stream twice in fp32; two normalised inputs, queries, keys and
    values, the attention output, and the MLP's hidden layer before and after GELU: 14 widths in the compute dtype.
    dropout: on a CPU, plain attention stores its probabilities in fp32, and what is kept of them. Frozen parameters
    have no gradient and no moments, and the activations of frozen blocks are not stored.
    """
    C, V, tokens = config.n_embd, config.vocab_size, batch_size * sequence_length
    number = 2 if reduced_precision else 4
    weights = config.num_parameters() * (4 + (2 if reduced_precision else 0))
    weights += config.num_trained_parameters(freeze_layers) * 12
    per_block = tokens * (8 * C + 14 * number * C)
    if dropout:
        per_block += tokens * 2 * C * (number if on_cpu else 1)
    if on_cpu and dropout:
        per_block += tokens * config.n_head * sequence_length * (4 + 2 * number)
    elif on_cpu and reduced_precision and sequence_length <= 256:  # plain attention stores its probabilities
        per_block += tokens * config.n_head * sequence_length * number
    trained_layers = config.n_layer - freeze_layers
    activations = trained_layers * per_block
    if gradient_checkpointing:
        activations = trained_layers * tokens * 4 * C + per_block
    head = (
        (0 if freeze_layers else V * C * (4 + 2 * number))
        + 2 * tokens * C * number
        + min(tokens, CHUNK_TOKENS) * V * number
    )
    total = weights + activations + head
    return round(total * HEAP_OVERHEAD + PROCESS_BYTES) if on_cpu else total


def largest_batch(
    config: GPTConfig,
    memory_bytes: int,
    *,
    gradient_checkpointing: bool,
    on_cpu: bool,
    reduced_precision: bool = True,
    sequence_length: int | None = None,
    dropout: bool = False,
    freeze_layers: int = 0,
) -> int:
    """The largest micro-batch that fits, in sequences of sequence_length (default: block_size); 0 if none fits."""
    length = sequence_length or config.block_size

    def fits(batch_size: int) -> bool:
        needed = training_bytes(
            config,
            batch_size,
            length,
            reduced_precision=reduced_precision,
            gradient_checkpointing=gradient_checkpointing,
            on_cpu=on_cpu,
            dropout=dropout,
            freeze_layers=freeze_layers,
        )
        return needed <= memory_bytes

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
