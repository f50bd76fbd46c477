"""What `python -m gpt2 plan` prints."""

from collections.abc import Callable, Sequence

from gpt2.planning.hardware import GPU, Cluster, Link
from gpt2.planning.plan import Plan, Run, best, sequences_per_gpu

LABEL = 26
COLUMN = 16


def describe(
    name: str, run: Run, gpu: GPU, cluster: Cluster, links: dict[str, str], found: Sequence[Plan], basis: dict[str, str]
) -> list[str]:
    """The lines of a plan. name: of the model. links: names of the links. basis: of speed and price, in words."""
    nodes = f"{cluster.nodes} nodes of {cluster.node_size}" if cluster.nodes > 1 else "one node"
    rows = [
        ("model", f"{name}: {run.config.num_parameters():,} parameters, {run.optimizer}"),
        ("hardware", f"{cluster.gpus} x {gpu.title}; {nodes}"),
    ]
    if cluster.node_size > 1:
        rows.append(("in a node", _link(links["GPUs"], cluster.link, cluster.link.bytes_per_s)))
    if cluster.nodes > 1:
        rows.append(("between nodes", _link(links["nodes"], cluster.network, cluster.network_bytes_per_s)))
    rows += [
        ("speed of a GPU", basis["speed"]),
        ("price of a GPU", basis["price"]),
        (
            "batch",
            f"{run.batch_size:,} sequences of {run.sequence_length:,} tokens: {run.batch_tokens:,} tokens a step, "
            f"{sequences_per_gpu(run, cluster.gpus):,} sequences for each GPU",
        ),
        ("run", f"{human(run.tokens)} tokens: {run.tokens / run.batch_tokens:,.0f} steps"),
    ]
    lines = [f"{label:<{LABEL}}{text}" for label, text in rows]
    return [*lines, "", *_table(found), "", _choice(run, gpu, cluster, found)]


def human(count: float) -> str:
    """A number with three digits and its unit: 31.2B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def _link(name: str, link: Link, bytes_per_s: float) -> str:
    return f"{name}: {bytes_per_s / 1e9:.3g} GB/s for each GPU, latency {link.latency_s * 1e6:.3g} µs"


def _table(found: Sequence[Plan]) -> list[str]:
    def row(label: str, text: Callable[[Plan], str], *, fits: bool = False) -> str:
        cells = ("-" if fits and not each.micro_batch else text(each) for each in found)
        return f"{label:<{LABEL}}" + "".join(f"{cell:>{COLUMN}}" for cell in cells)

    def seconds(label: str, value: Callable[[Plan], float]) -> str:
        return row(label, lambda each: f"{1000 * value(each):,.1f} ms", fits=True)

    return [
        row("strategy", lambda each: each.strategy),
        row("weights", lambda each: _gb(each.memory.weights)),
        row("gradients", lambda each: _gb(each.memory.gradients)),
        row("optimizer state", lambda each: _gb(each.memory.optimizer_state)),
        row("activations", lambda each: _gb(each.memory.activations)),
        row("memory of a device", lambda each: _gb(each.memory.total)),
        row("gradient checkpointing", lambda each: "yes" if each.checkpointing else "no"),
        row("micro-batch", lambda each: f"{each.micro_batches} x {each.micro_batch}" if each.micro_batch else "none"),
        seconds("computation", lambda each: each.time.compute_s if each.time else 0.0),
        seconds("optimizer", lambda each: each.time.optimizer_s if each.time else 0.0),
        seconds("communication", lambda each: each.time.communication_s if each.time else 0.0),
        seconds("- of it not hidden", lambda each: each.time.exposed_s if each.time else 0.0),
        seconds("step", lambda each: each.time.total_s if each.time else 0.0),
        row("tokens/s", lambda each: f"{each.tokens_per_s:,.0f}", fits=True),
        row("efficiency", lambda each: f"{each.efficiency:.1%}", fits=True),
        row("MFU", lambda each: f"{each.mfu:.1%}", fits=True),
        row("hours", lambda each: f"{each.hours:,.1f}", fits=True),
        row("dollars", lambda each: f"{each.dollars:,.0f}", fits=True),
    ]


def _choice(run: Run, gpu: GPU, cluster: Cluster, found: Sequence[Plan]) -> str:
    chosen = best(found)
    if chosen is None:
        least = min(each.memory.total for each in found)
        return (
            f"does not fit: a device needs {_gb(least)} and has {_gb(gpu.memory_bytes)} for training; "
            "take more GPUs, larger ones, or shorter sequences"
        )
    settings = [
        f"runtime.strategy={chosen.strategy}",
        f"train.batch_size={chosen.micro_batch}",
        f"train.gradient_accumulation_steps={chosen.micro_batches * cluster.gpus}",
        f"train.sequence_length={run.sequence_length}",
    ]
    if chosen.checkpointing:
        settings.append("runtime.gradient_checkpointing=true")
    return f"take {chosen.strategy}, micro-batches of {chosen.micro_batch} for each GPU: {' '.join(settings)}"


def _gb(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"
