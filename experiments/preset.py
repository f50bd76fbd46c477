"""`python -m gpt2 preset auto`: writes a params.yaml for a text, this machine and the minutes that a run may take."""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from experiments.automatic.machine import Machine
from experiments.automatic.plan import Budget, Plan, choose, describe
from experiments.automatic.probe import Speed
from experiments.automatic.recipe import Recipe
from experiments.automatic.text import MIN_TOKENS, Text, look_at
from experiments.automatic.values import describe_loss, describe_text, header, run_values, training_values
from experiments.automatic.writing import keep, with_changes
from gpt2.errors import UserError
from gpt2.files import write_text
from stages import cores, paths, preflight, workers
from stages.params import Params, check_params, load_params
from stages.process import echo

AUTO = "auto"
MAX_MINUTES = 100_000
TEMPLATE = Path("presets/laptop.yaml")
"""What the new params are made from if there is no params.yaml."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("name", choices=[AUTO], help="`make preset NAME=...` copies the others")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="of `dvc repro` (default: 10)")
    parser.add_argument("--source", metavar="TEXT", help="as corpus.source (default: that of params.yaml)")
    parser.add_argument("--dry-run", action="store_true", help="show the params; write nothing")


def run(arguments: argparse.Namespace) -> int:
    """Looks at the text, measures, and writes params.yaml. Returns the exit code."""
    minutes = arguments.minutes
    if not 0 < minutes <= MAX_MINUTES:
        raise UserError(f"--minutes is {minutes:g}; expected a number over 0, up to {MAX_MINUTES:,}")
    file = paths.PARAMS if paths.PARAMS.exists() else TEMPLATE
    load_params(file)  # whose messages name lines of the file
    template = file.read_text(encoding="utf-8")
    if arguments.source is not None:
        template = with_changes(template, {("corpus", "source"): (arguments.source, "")})
    params = checked(template)
    if (processes := workers.count(params)) > 1:
        raise UserError(
            f"`preset auto` measures one process, and {processes} would train; set runtime.processes: 1, or choose "
            "another preset"
        )
    with tempfile.TemporaryDirectory(prefix="preset-auto-") as folder:
        text, reading_s = read(params, Path(folder))
        plan, device = find(params, template, text, Budget(60 * minutes, reading_s, text), folder)
    values = {**training_values(plan.recipe, text), **run_values(plan, text)}
    content = with_changes(template, values, header(plan, text, minutes, device))
    checked(content)
    echo(f"chosen: {describe(plan.recipe)}; {describe_loss(plan, text)}")
    if arguments.dry_run:
        print(content, end="")
        return 0
    copy = keep(paths.PARAMS)
    write_text(paths.PARAMS, content)
    if copy is not None:
        echo(f"{copy}: params.yaml as it was")
    echo(f"{paths.PARAMS} is written; `dvc repro` is planned to take {plan.seconds / 60:.1f} minutes")
    return 0


def checked(text: str) -> Params:
    """The params of a file's content. Raises UserError."""
    return check_params(YAML(typ="safe", pure=True).load(text), str(paths.PARAMS))


def read(params: Params, folder: Path) -> tuple[Text, float]:
    """The text, and the seconds that it took to read. Raises UserError if it is too short."""
    start_s = time.perf_counter()
    text = look_at(params.corpus, params.tokenize, folder, params.runtime.threads or cores.available())
    echo(describe_text(text))
    if text.tokens < MIN_TOKENS:
        raise UserError(f"the text has {text.tokens:,} tokens; training takes at least {MIN_TOKENS:,}")
    return text, time.perf_counter() - start_s


def find(params: Params, template: str, text: Text, budget: Budget, folder: str) -> tuple[Plan, str]:
    """The best plan for this machine, and the name of its device."""
    from gpt2.device import choose_device, choose_precision, device_name, peak_flops

    device = choose_device(params.runtime.device)
    precision = choose_precision(device, params.runtime.precision)
    peak = peak_flops(device, precision, paths.real_root() / "checkpoints/peak-flops.json")
    machine = Machine(Path(folder), text.distinct)

    def measure(chosen: Recipe, *, thorough: bool) -> Speed:
        # as long as no run is, so that it is compiled
        changes: dict[tuple[str, str], tuple[Any, str]] = {("train", "max_steps"): (10**6, "")}
        changes |= training_values(chosen, text)
        if not thorough:
            changes["runtime", "compile"] = ("never", "")
        content = with_changes(template, changes)
        measured = checked(content)
        preflight.micro_batch_that_fits(measured)
        return machine.speed(measured, content, thorough=thorough)

    return choose(budget, measure, peak, echo), device_name(device)
