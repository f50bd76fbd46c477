"""Where the time of a training step goes, and what bounds each part: its FLOPs and bytes against this machine's limits.

    python -m benchmarks.roofline                    GPT-2 124M on 32 x 128 tokens and the preset laptop; a few minutes

Peak FLOP/s and bandwidth are measured in the same run. Each part runs alone, one after the other, in rounds; the time
of what is between the products (LayerNorm, GELU, residuals, casts) is that of the whole step less the parts. FLOPs and
bytes are those that the algorithm needs: each tensor is read and written once. Writes
reports/benchmarks/roofline.json and docs/training-roofline.png.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.steps import our_step
from benchmarks.train import CASES
from gpt2.config import GPT2_VOCAB_SIZE, GPTConfig
from gpt2.device import PROBE_SIZE, choose_precision, configure_device, device_name, matmul_flops
from gpt2.model.attention import causal_attention
from gpt2.model.transformer import INIT_STD
from gpt2.training.loss import linear_cross_entropy

REPORT, PICTURE = Path("reports/benchmarks/roofline.json"), Path("docs/training-roofline.png")
ROUNDS = 5
SUMMED_BYTES = 1 << 29
COLORS = {"gpt2-128": "#c2410c", "laptop": "#2563eb"}
HEIGHTS = {"gpt2-128": 4, "laptop": -4}
"""Of the labels of a case over the middle of their discs, in points, so that those of two cases do not overlap."""
LABELS = {"products of the blocks": ((-16, 0), "right"), "head and loss": ((20, -6), "left")}
"""Where a label is, in points from the middle of its disc, and the side that it is aligned at."""
DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Part:
    """Work of a step. repeats: how often it runs in a step. bytes: read and written, once each."""

    name: str
    run: Callable[[], object]
    repeats: int
    flops: float
    bytes: float


def main() -> None:
    """Measures, and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=COLORS, action="append", help="default: both")
    arguments = parser.parse_args()
    configure_device(DEVICE)
    dtype = choose_precision(DEVICE, "auto")
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{device_name(DEVICE)}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "dtype": str(dtype).removeprefix("torch."),
        "peak_flops": matmul_flops(DEVICE, dtype, PROBE_SIZE["cpu"]),
        "bandwidth": bandwidth(),
        "cases": {case: measure(case, dtype) for case in arguments.case or COLORS},
    }
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(result, indent=1) + "\n")
    draw(result)


def bandwidth() -> float:
    """Bytes per second, read and written, of `a += b` with tensors that fit no cache: the best of six."""
    total, part = torch.zeros(SUMMED_BYTES // 4), torch.ones(SUMMED_BYTES // 4)
    return 3 * SUMMED_BYTES / min(seconds_of(lambda: total.add_(part)) for _ in range(6))


def seconds_of(action: Callable[[], object]) -> float:
    """Wall time."""
    start_s = time.perf_counter()
    action()
    return time.perf_counter() - start_s


def measure(case: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Seconds, FLOPs and bytes of each part of a step with one micro-batch, and of the rest."""
    sizes, batch_size, length, _ = CASES[case]
    config = GPTConfig(vocab_size=GPT2_VOCAB_SIZE, **sizes)
    torch.manual_seed(0)
    inputs, targets = (torch.randint(0, config.vocab_size, (batch_size, length)) for _ in range(2))
    optimizer_s: list[float] = []
    step = our_step({"compile": True}, config, dtype, DEVICE, [(inputs, targets)], optimizer_s)
    parts = parts_of(config, batch_size, length, dtype)
    for action in (step, *(part.run for part in parts)):
        action()
    whole_s: list[float] = []
    parts_s: dict[str, list[float]] = {part.name: [] for part in parts}
    optimizer_s.clear()
    for _ in range(ROUNDS):
        whole_s.append(seconds_of(step))
        for part in parts:
            parts_s[part.name].append(seconds_of(part.run))
    rows: list[dict[str, Any]] = [
        {
            "part": part.name,
            "seconds": part.repeats * statistics.median(parts_s[part.name]),
            "flops": part.repeats * part.flops,
            "bytes": part.repeats * part.bytes,
        }
        for part in parts
    ]
    parameters = config.num_parameters()
    # reads weight, gradient and two moments, and writes all but the gradient
    rows.append(
        {
            "part": "optimizer (AdamW)",
            "seconds": statistics.median(optimizer_s),
            "flops": 15.0 * parameters,
            "bytes": 28.0 * parameters,
        }
    )
    number, tokens = dtype.itemsize, batch_size * length
    rest_s = statistics.median(whole_s) - sum(row["seconds"] for row in rows)
    # residual stream, LayerNorms and GELU, forward and backward: 24 widths in fp32 and 28 in the dtype of the products
    rows.append(
        {
            "part": "between the products",
            "seconds": max(0.0, rest_s),
            "flops": config.n_layer * tokens * config.n_embd * 150.0,
            "bytes": config.n_layer * tokens * config.n_embd * (24.0 * 4 + 28.0 * number),
        }
    )
    for row in rows:
        speed = row["flops"] / row["seconds"] / 1e9 if row["seconds"] else 0.0
        print(f"{case}: {row['part']}: {row['seconds']:.3f} s, {speed:,.1f} GFLOP/s", flush=True)
    return rows


def parts_of(config: GPTConfig, batch_size: int, length: int, dtype: torch.dtype) -> list[Part]:
    """The matrix products of a block, its attention, and the head."""
    tokens, C, V, number = batch_size * length, config.n_embd, config.vocab_size, dtype.itemsize
    shapes = ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C))  # rows and columns of the weights
    products = [product(tokens, *shape, dtype) for shape in shapes]

    def block() -> None:
        for each in products:
            each()

    q, k, v = (
        torch.randn(batch_size, config.n_head, length, config.head_size).to(dtype).requires_grad_() for _ in range(3)
    )
    gradient = torch.randn(batch_size, config.n_head, length, config.head_size).to(dtype)
    hidden = torch.randn(tokens, C).to(dtype).requires_grad_()
    weight = (INIT_STD * torch.randn(V, C)).to(dtype).requires_grad_()  # otherwise most probabilities are denormal
    targets = torch.randint(0, V, (tokens,))
    return [
        Part(
            "products of the blocks",
            block,
            config.n_layer,
            sum(6.0 * tokens * n * k for n, k in shapes),
            sum(3.0 * number * (tokens * n + tokens * k + n * k) for n, k in shapes),
        ),
        Part(
            "attention",
            lambda: causal_attention(q, k, v).backward(gradient),  # type: ignore[no-untyped-call]
            config.n_layer,
            7.0 * tokens * length * C,  # half of the 12 of a full matrix, and the scores again
            12.0 * number * tokens * C,
        ),
        Part(
            "head and loss",
            lambda: linear_cross_entropy(hidden, weight, targets, compiled=True).backward(),  # type: ignore[no-untyped-call]
            1,
            6.0 * tokens * V * C,
            number * (3.0 * V * C + 3.0 * tokens * C + 4.0 * tokens * V),
        ),
    ]


def product(tokens: int, n: int, k: int, dtype: torch.dtype) -> Callable[[], None]:
    """A linear layer, forward and backward."""
    x, w, g = (torch.randn(shape).to(dtype) for shape in ((tokens, k), (n, k), (tokens, n)))
    outputs: list[Tensor] = [torch.empty(shape, dtype=dtype) for shape in ((tokens, n), (tokens, k), (n, k))]

    def run() -> None:
        torch.mm(x, w.t(), out=outputs[0])
        torch.mm(g, w, out=outputs[1])
        torch.mm(g.t(), x, out=outputs[2])

    return run


def draw(result: dict[str, Any]) -> None:
    """The roofline, with a disc for each part, as large as its share of the step."""
    import numpy as np
    from matplotlib.figure import Figure

    peak, speed = result["peak_flops"] / 1e9, result["bandwidth"] / 1e9
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axes = figure.subplots()
    intensity = np.geomspace(0.1, 2000, 200)
    axes.loglog(intensity, np.minimum(peak, speed * intensity), color="#475569", linewidth=1.5)
    axes.annotate(f"{peak:,.0f} GFLOP/s, {result['dtype']}", (2000, peak), ha="right", va="bottom", fontsize=9)
    axes.annotate(f"{speed:,.1f} GB/s", (0.11, 0.16 * speed), fontsize=9)
    for case, rows in result["cases"].items():
        total = sum(row["seconds"] for row in rows)
        for row in rows:
            if not row["seconds"]:
                continue
            x, y = row["flops"] / row["bytes"], row["flops"] / row["seconds"] / 1e9
            share = row["seconds"] / total
            axes.scatter(x, y, s=30 + 1500 * share, color=COLORS[case], alpha=0.45, linewidths=0)
            place, side = LABELS.get(row["part"], ((8, HEIGHTS[case]), "left"))
            label = f"{row['part']} {share:.0%}"
            axes.annotate(label, (x, y), xytext=place, textcoords="offset points", ha=side, va="center", fontsize=7.5)
        axes.scatter([], [], color=COLORS[case], label=case)
    axes.set(xlabel="FLOPs for each byte of memory", ylabel="GFLOP/s")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
