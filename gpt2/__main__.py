"""`python -m gpt2`: generate text, show what a configuration costs, plan a training on many GPUs, publish; and, in the
project's repository, the commands of `experiments`.

torch is imported only by the commands that compute, so that help and errors are immediate.
"""

import argparse
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from gpt2.config import DTYPES, PRESETS, GPTConfig
from gpt2.errors import GPT2Error, UserError
from gpt2.memory import MACHINES, largest_batch
from gpt2.planning.command import add_arguments, plan_lines

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")

PROJECT_COMMANDS = {
    "compare": "which experiment, commit or MLflow run is better, and is the difference more than luck?",
    "reproduce": "train a finished run again, and compare the bits",
    "ladder": "train several sizes, and predict the loss and the cost of a larger run",
    "sweep": "search params with Optuna; each trial is a DVC experiment and an MLflow run",
    "preset": "write a params.yaml for a text, this machine and the minutes that a run may take",
    "report": "a page that compares runs: leaderboard, curves, samples, token losses",
}
"""Commands of the project's repository, with their help: modules of `experiments`, imported when they are called."""

COMPILE_WAIT_S = 120


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns the exit code."""
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        return arguments.run(arguments) or 0
    except GPT2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # for example, piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a command; `run` in them is its function."""
    parser = argparse.ArgumentParser(prog="python -m gpt2", description="Use GPT-2 from the command line.")
    commands = parser.add_subparsers(required=True, metavar="command")

    generate = commands.add_parser("generate", help="generate text with a trained model")
    generate.add_argument("--prompt", default="", help="the text to continue; - reads standard input")
    generate.add_argument(
        "--model",
        default="models",
        help="a folder with model.safetensors and config.json, or a Hugging Face GPT-2 (default: %(default)s)",
    )
    generate.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default: %(default)s")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 is greedy decoding (default: %(default)s)")
    generate.add_argument("--top-k", type=int, default=50, help="0 is off (default: %(default)s)")
    generate.add_argument("--top-p", type=float, default=1.0, help="1 is off (default: %(default)s)")
    generate.add_argument(
        "--seed", type=int, default=1, help="the same seed generates the same text (default: %(default)s)"
    )
    generate.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="attend to at most N tokens (default: the sequence length of the training)",
    )
    generate.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="over 1 makes earlier tokens less likely (default: %(default)s, off)",
    )
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    generate.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="int8 and int4 quantize; auto: the fastest here of fp32, bf16 and int8 (default: %(default)s)",
    )
    generate.add_argument(
        "--stats",
        action="store_true",
        help="print tokens/s, time to first token and dtype on standard error",
    )
    for old, new in (("--format", "--dtype"), ("--context", "--context-length")):
        generate.add_argument(old, action=_Renamed, const=new, help=argparse.SUPPRESS)
    generate.set_defaults(run=_generate)

    publish = commands.add_parser("publish", help="upload the exported Space and model to the Hugging Face Hub")
    publish.add_argument("--repo", required=True, metavar="USER/NAME", help="target repository; created if missing")
    publish.add_argument("--space", action="store_true", help="the Space (default: both)")
    publish.add_argument("--model", action="store_true", help="the model (default: both)")
    publish.add_argument("--dist", type=Path, default=Path("dist"), help="the folder of both (default: %(default)s)")
    publish.add_argument("--dry-run", action="store_true", help="only list what would be uploaded; needs no token")
    publish.set_defaults(run=_publish)

    info = commands.add_parser("info", help="parameters, FLOPs and memory of a configuration")
    which = info.add_mutually_exclusive_group()
    which.add_argument("--preset", choices=list(PRESETS), help="one of OpenAI's sizes")
    which.add_argument("--model", help="a model folder with a config.json (default: models)")
    for name in SIZES:
        info.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="override this size")
    info.set_defaults(run=_info)

    plan = commands.add_parser("plan", help="memory, speed and cost of a training on several GPUs")
    add_arguments(plan)
    plan.set_defaults(run=_plan)

    for name, text in PROJECT_COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if argv[:1] == [name]:
            module = _project_module(name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser.parse_args(argv)


def _project_module(name: str) -> Any:
    """The module of a project command, which has `add_arguments(parser)` and `run(arguments)`."""
    try:
        return importlib.import_module(f"experiments.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("experiments", f"experiments.{name}"):
            raise
        raise UserError(f"`{name}` works in the project's repository: change to its folder, and try again") from None


class _Renamed(argparse.Action):
    """An option of an earlier version; `const` is its name now."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: object, option_string: str | None = None
    ) -> None:
        parser.error(f"{option_string} was renamed to {self.const}")


def _generate(arguments: argparse.Namespace) -> None:
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {arguments.max_new_tokens}; expected at least 1")
    if arguments.context_length is not None and arguments.context_length < 1:
        raise UserError(f"--context-length is {arguments.context_length}; expected at least 1")

    from gpt2 import tokenizer
    from gpt2.device import choose_device, configure_device
    from gpt2.inference.engine import Engine
    from gpt2.inference.quantization import fastest_dtype, quantize
    from gpt2.inference.request import BLANK_PROMPT, Request, Sampling
    from gpt2.kernels import library
    from gpt2.model.storage import load_model, trained_context_length

    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    request = Request(
        tokenizer.encode(prompt or BLANK_PROMPT),
        arguments.max_new_tokens,
        Sampling(
            temperature=arguments.temperature,
            top_k=arguments.top_k or None,
            top_p=arguments.top_p,
            repetition_penalty=arguments.repetition_penalty,
        ),
        seed=arguments.seed,
        stop=tuple(arguments.stop),
    )
    device = choose_device("auto")
    configure_device(device)
    build = library.start_build() if device.type == "cpu" else None  # beside loading the model
    model = load_model(arguments.model).to(device)
    if build is not None and not build.has_ended():
        print("compiling the kernels for this CPU, once...", file=sys.stderr)
        build.has_ended(COMPILE_WAIT_S)
    dtype = fastest_dtype(model) if arguments.dtype == "auto" else arguments.dtype
    context_length = arguments.context_length or trained_context_length(Path(arguments.model))
    engine = Engine(quantize(model, dtype), context_length=context_length)
    print(prompt, end="", flush=True)
    start_s = time.perf_counter()
    arrivals_s = []
    for token in engine.submit(request):
        arrivals_s.append(time.perf_counter())
        print(token.text, end="", flush=True)
    print()
    if arguments.stats:
        print(_speed(f"{dtype}, {engine.path}", start_s, arrivals_s), file=sys.stderr)


def _speed(how: str, start_s: float, arrivals_s: list[float]) -> str:
    first_s = arrivals_s[0] - start_s
    line = f"{how}: first token after {first_s * 1000:.0f} ms"
    if len(arrivals_s) > 1:
        line += f", then {(len(arrivals_s) - 1) / (arrivals_s[-1] - arrivals_s[0]):.1f} tokens/s"
    return f"{line}; {len(arrivals_s)} tokens in {arrivals_s[-1] - start_s:.2f} s"


def _publish(arguments: argparse.Namespace) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", arguments.repo):
        raise UserError(f"--repo is {arguments.repo!r}; expected user/name")

    from gpt2.hub.publish import Target, publish

    folders = {"model": "hf", "space": "space"}
    kinds = [kind for kind in folders if getattr(arguments, kind)] or list(folders)
    targets = [Target(kind, arguments.dist / folders[kind]) for kind in kinds]
    listings = [target.listing(arguments.repo) for target in targets]
    print("\n".join(listings), flush=True)
    if not arguments.dry_run:
        for target in targets:
            address = publish(arguments.repo, target, lambda line: print(line, file=sys.stderr))
            print(f"{target.kind}: {address}", flush=True)


def _info(arguments: argparse.Namespace) -> None:
    if arguments.preset:
        base = GPTConfig.preset(arguments.preset)
    else:
        path = Path(arguments.model or "models", "config.json")
        try:
            base = GPTConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            if arguments.model:
                raise UserError(f"cannot read {path}: {error}") from None
            base = PRESETS["gpt2"]  # no trained model yet
    given = {name: getattr(arguments, name) for name in SIZES if getattr(arguments, name) is not None}
    config = GPTConfig.from_dict({**base.to_dict(), **given})
    print("\n".join(_describe(config)))


def _plan(arguments: argparse.Namespace) -> None:
    print("\n".join(plan_lines(arguments)))


def _describe(config: GPTConfig) -> list[str]:
    parameters = config.num_parameters()
    embeddings = (config.vocab_size + config.block_size) * config.n_embd
    training_flops = config.flops_per_token(config.block_size)
    sizes = ", ".join(f"{name} {value:,}" for name, value in config.to_dict().items())
    cache_bytes = 2 * 4 * config.n_layer * config.n_embd * config.block_size
    rows = [
        ("parameters", f"{parameters:,} ({embeddings:,} of them embeddings)"),
        ("FLOPs for a token of training", f"{training_flops:,} at the full context"),
        ("weights, fp32", _bytes(4 * parameters)),
        ("weights, gradients and AdamW, fp32", _bytes(16 * parameters) + ", before activations"),
        ("KV cache of a full context, fp32", _bytes(cache_bytes)),
        ("checkpoint on the disk", _bytes(12 * parameters)),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [sizes, *(f"{name:<{width}}  {value}" for name, value in rows)]
    lines += ["", f"Sequences of {config.block_size:,} tokens that fit into a micro-batch, bf16 or fp16 (estimated):"]
    lines += [f"{'':<22}{'':>12}{'with gradient checkpointing':>30}"]
    for machine, memory_bytes in MACHINES.items():
        fitting = (
            largest_batch(config, memory_bytes, gradient_checkpointing=checkpointing, on_cpu="laptop" in machine)
            for checkpointing in (False, True)
        )
        plain, checkpointed = (f"{count:,}" if count else "none" for count in fitting)
        lines.append(f"{machine:<22}{plain:>12}{checkpointed:>30}")
    return lines


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
