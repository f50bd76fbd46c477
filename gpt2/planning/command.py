"""The arguments of `python -m gpt2 plan`."""

import argparse
import math
import re
from collections.abc import Iterable

from gpt2.config import PRESETS, GPTConfig
from gpt2.errors import UserError
from gpt2.planning.hardware import ALIASES, GPU, GPUS, LINKS, build_cluster, find_gpu, interconnect
from gpt2.planning.plan import Run, plans
from gpt2.planning.report import describe
from gpt2.planning.step import Workload

BATCH_TOKENS = 2**19
"""Default batch: that of GPT-3 for models of this size, table 2.1 of https://arxiv.org/abs/2005.14165."""
TOKENS_PER_PARAMETER = 20
"""Default length of a run: compute-optimal, https://arxiv.org/abs/2203.15556."""
OPTIMIZERS = ("adamw", "muon")
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command. Their values are checked by `plan_lines`."""
    parser.add_argument("--preset", required=True, metavar="NAME", help=f"the model: {_names(PRESETS)}")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help=f"{_names(GPUS)} (default: %(default)s)")
    parser.add_argument(
        "--interconnect",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"in a node, between nodes, or both: {_names([*LINKS, *ALIASES])} (default: what the GPU usually has)",
    )
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="default: what the GPU usually has")
    parser.add_argument("--tokens", metavar="N", help="length of the run, such as 10B (default: 20 for each parameter)")
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument("--batch-size", type=int, metavar="N", help="sequences in a step, of all GPUs")
    batch.add_argument("--batch-tokens", metavar="N", help="the same in tokens (default: 524288)")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="default: the context of the model")
    parser.add_argument("--optimizer", default="adamw", metavar="NAME", help="adamw or muon (default: %(default)s)")
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="of one GPU for an hour")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--mfu", type=float, help="fraction of the GPU's peak that you measured on one GPU")
    speed.add_argument(
        "--tokens-per-second-per-gpu", type=float, metavar="N", help="what you measured on one GPU with this model"
    )


def plan_lines(arguments: argparse.Namespace) -> list[str]:
    """The plan for parsed arguments, in lines. Raises UserError for values that make no sense."""
    config = GPTConfig.preset(arguments.preset)
    gpu = find_gpu(arguments.gpu)
    links = interconnect(gpu, arguments.interconnect)
    cluster = build_cluster(gpu, arguments.gpus, arguments.interconnect, arguments.gpus_per_node)
    run = _run(arguments, config)
    flops_per_s, basis = _speed(arguments, gpu, Workload.of(config, run.sequence_length).flops_per_token)
    price = gpu.dollars_per_hour if arguments.price is None else arguments.price
    if not 0 <= price < math.inf:
        raise UserError(f"--price is {price}; expected dollars for an hour")
    source = gpu.price_source if arguments.price is None else "given"
    found = plans(run, gpu, cluster, flops_per_s=flops_per_s, dollars_per_hour=price)
    words = {"speed": basis, "price": f"${price:.2f} an hour ({source})"}
    return describe(arguments.preset, run, gpu, cluster, links, found, words)


def parse_count(option: str, text: str) -> float:
    """A number such as 300e9, 0.5M or 10B. Raises UserError unless it is at least 1."""
    match = re.fullmatch(r"([\d_,.]+(?:e\d+)?)([KMBT]?)", text, re.IGNORECASE)
    try:
        count = float(match[1].replace(",", "")) * UNITS[match[2].upper()] if match else 0.0
    except ValueError:
        count = 0.0
    if not 1 <= count < math.inf:
        raise UserError(f"{option} is {text}; expected a number such as 300e9, 0.5M or 10B")
    return count


def _run(arguments: argparse.Namespace, config: GPTConfig) -> Run:
    length = config.block_size if arguments.sequence_length is None else arguments.sequence_length
    if not 1 <= length <= config.block_size:
        raise UserError(f"--sequence-length is {length}; expected 1 to {config.block_size}")
    if arguments.batch_size is not None:
        batch_size = arguments.batch_size
        if batch_size < 1:
            raise UserError(f"--batch-size is {batch_size}; expected at least 1 sequence")
    else:
        batch_tokens = BATCH_TOKENS if arguments.batch_tokens is None else _batch_tokens(arguments.batch_tokens)
        if batch_tokens % length:
            gpus = arguments.gpus
            nearest = gpus * max(1, round(batch_tokens / length / gpus))
            raise UserError(
                f"a batch of {batch_tokens:,} tokens is not a multiple of the sequence length {length:,}; "
                f"near it for {gpus} GPUs: --batch-size {nearest}"
            )
        batch_size = batch_tokens // length
    if arguments.optimizer not in OPTIMIZERS:
        raise UserError(f"no optimizer {arguments.optimizer!r}; there are: {', '.join(OPTIMIZERS)}")
    tokens = TOKENS_PER_PARAMETER * float(config.num_parameters())
    if arguments.tokens is not None:
        tokens = parse_count("--tokens", arguments.tokens)
    return Run(config, batch_size, length, tokens, arguments.optimizer)


def _batch_tokens(text: str) -> int:
    count = parse_count("--batch-tokens", text)
    if count != int(count):
        raise UserError(f"--batch-tokens is {text}; expected a whole number of tokens")
    return int(count)


def _speed(arguments: argparse.Namespace, gpu: GPU, flops_per_token: float) -> tuple[float, str]:
    """FLOP/s of a GPU, and where they come from."""
    measured, mfu = arguments.tokens_per_second_per_gpu, arguments.mfu
    if measured is not None:
        if not 0 < measured < math.inf:
            raise UserError(f"--tokens-per-second-per-gpu is {measured}; expected a number over 0")
        return measured * flops_per_token, f"{measured:,.0f} tokens/s alone (given)"
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu is {mfu}; expected a fraction over 0, up to 1")
    fraction, source = (gpu.mfu, gpu.mfu_source) if mfu is None else (mfu, "given")
    return fraction * gpu.peak_flops, f"{fraction:.2f} of {gpu.peak_flops / 1e12:.4g} TFLOP/s ({source})"


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)
