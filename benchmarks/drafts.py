"""Generation with prompt-lookup drafts, beside generation without: `python -m benchmarks.drafts`, a minute or two.

    python -m benchmarks.drafts --dtypes fp32 bf16 int8 int4

A trained model (`--model`, made by `dvc repro`) continues passages of its own held-out text, and of Python source:
modules of the standard library. One text at a time, greedily and sampled. A passage and what follows it are together
as long as what the model was trained on. With and without drafts in turns, best of the rounds; the time to the first
token is left out. Both have to write the same text. Writes reports/benchmarks/drafts.{json,md}.
"""

import argparse
import inspect
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from gpt2.inference.engine import Engine
    from gpt2.inference.speculation import Drafter

REPORT = Path("reports/benchmarks")
PASSAGES, ROUNDS = 8, 5
TEMPERATURES = (0.0, 0.5, 0.8, 1.0)


def main() -> None:
    """Measures each dtype, text and temperature."""
    import torch

    from benchmarks.generation import machine
    from gpt2.device import configure_device
    from gpt2.model.storage import load_folder, trained_context_length

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models"), help="folder of a trained model")
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"), help="folder of its held-out tokens")
    parser.add_argument("--dtypes", nargs="+", default=["int8"], help="default: %(default)s")
    arguments = parser.parse_args()
    configure_device(torch.device("cpu"))
    length = trained_context_length(arguments.model) or load_folder(arguments.model).config.block_size
    rows = []
    for dtype in arguments.dtypes:
        engines = {drafts: engine(arguments.model, dtype, length, drafts=drafts) for drafts in (False, True)}
        for text, tokens in texts(arguments.tokens).items():
            for temperature in TEMPERATURES:
                row = measure(engines, passages(tokens, length // 2), length - length // 2, temperature)
                rows.append({"dtype": dtype, "text": text, "temperature": temperature, **row})
                print(rows[-1], flush=True)
    cpuinfo = Path("/proc/cpuinfo")
    cpu = machine.cpu_name(cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else "", os.environ)
    facts = {"machine": f"{cpu}, {torch.get_num_threads()} threads", "version": machine.commit(), "length": length}
    write({**facts, "rows": rows})


def engine(folder: Path, dtype: str, context_length: int, *, drafts: bool) -> "Engine":
    """An engine with the compiled kernels: PyTorch's have no drafts. Exits without."""
    from gpt2.inference.engine import Engine
    from gpt2.inference.quantization import quantize
    from gpt2.model.storage import load_folder

    made = Engine(quantize(load_folder(folder), dtype), context_length=context_length, speculate=drafts)
    if not made.wait_until_compiled(60):
        raise SystemExit(f"drafts need the compiled kernels; this machine decodes with {made.path}")
    return made


def texts(folder: Path) -> dict[str, Sequence[int]]:
    """Token ids of what is continued, by name."""
    from gpt2 import tokenizer
    from gpt2.data.token_files import open_tokens

    source = "".join(inspect.getsource(module) for module in (argparse, inspect))
    return {"held-out text": open_tokens(folder, "val")[:].tolist(), "Python source": tokenizer.encode(source)}


def passages(tokens: Sequence[int], length: int, count: int = PASSAGES) -> list[list[int]]:
    """Token ids of `count` passages, at equal distances."""
    last = len(tokens) - length
    return [list(tokens[start : start + length]) for start in (last * i // count for i in range(count))]


def measure(
    engines: "dict[bool, Engine]", prompts: list[list[int]], num_tokens: int, temperature: float, rounds: int = ROUNDS
) -> dict[str, float]:
    """Tokens/s with and without drafts.

    drafted: tokens in drafts for each generated token; accepted: the share of them that was right. Raises RuntimeError
    if the texts differ.
    """
    seconds = {False: float("inf"), True: float("inf")}
    with counted() as counts:
        for _ in range(rounds):
            found = {drafts: generate(engines[drafts], prompts, num_tokens, temperature) for drafts in engines}
            if found[False][0] != found[True][0]:
                raise RuntimeError("the texts with and without drafts differ")
            seconds = {drafts: min(seconds[drafts], found[drafts][1]) for drafts in engines}
    tokens = len(prompts) * (num_tokens - 1)
    return {
        "without": tokens / seconds[False],
        "with": tokens / seconds[True],
        "ratio": seconds[False] / seconds[True],
        "drafted": counts["proposed"] / tokens / rounds,
        "accepted": counts["accepted"] / max(1, counts["proposed"]),
    }


def generate(
    engine: "Engine", prompts: list[list[int]], num_tokens: int, temperature: float
) -> tuple[list[list[int]], float]:
    """What follows each prompt, one after the other, and the seconds for all tokens but the first of each."""
    from gpt2.inference.request import Request, Sampling

    generated, seconds = [], 0.0
    for seed, prompt in enumerate(prompts):
        request = Request(prompt, num_tokens, Sampling(temperature), seed=seed, stop_token_ids=frozenset())
        tokens = iter(engine.submit(request))
        first = next(tokens)
        start_s = time.perf_counter()
        generated.append([first.id, *(token.id for token in tokens)])
        seconds += time.perf_counter() - start_s
    return generated, seconds


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts the tokens that are proposed in drafts, and those that are accepted."""
    from gpt2.inference.speculation import Drafter

    counts, record = {"proposed": 0, "accepted": 0}, Drafter.record

    def count(self: "Drafter", proposed: int, accepted: int) -> None:
        counts["proposed"] += proposed
        counts["accepted"] += accepted
        record(self, proposed, accepted)

    with mock.patch.object(Drafter, "record", count):
        yield counts


def write(report: dict[str, Any], folder: Path = REPORT) -> None:
    """Writes drafts.json and drafts.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "drafts.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    lines = [
        "# Generation with drafts",
        "",
        f"Made by `python -m benchmarks.drafts`. {report['machine']}; {report['version']}. The model in `models/` "
        f"continues {PASSAGES} passages of each text, one at a time, up to {report['length']} tokens in all. New "
        f"tokens/s after the first, best of {ROUNDS} rounds in turns; both ways write the same text.",
        "",
        "| dtype | text | temperature | without drafts | with drafts | ratio | drafted per token | of them right |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {row['dtype']} | {row['text']} | {row['temperature']} | {row['without']:,.0f} | {row['with']:,.0f} "
            f"| {row['ratio']:.2f} | {row['drafted']:.2f} | {row['accepted']:.0%} |"
            for row in report["rows"]
        ),
    ]
    (folder / "drafts.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
