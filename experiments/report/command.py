"""`python -m gpt2 report`: finished runs as one page."""

import argparse
import time
from pathlib import Path

from experiments.files import git
from experiments.report.page import write_report
from experiments.report.vega import write_template
from experiments.runs import WORKSPACE, Run, experiments, find_run
from gpt2.errors import FileError, UserError, one_line

OUTPUT = Path("reports/experiments.html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = "Writes a page that compares runs. It opens without a network."
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="an experiment, branch, tag, commit, MLflow run, or workspace (default: all DVC experiments, the last "
        "commit and the workspace)",
    )
    parser.add_argument(
        "--dvc-plots",
        action="store_true",
        help="only make `dvc plots show` and `dvc plots diff` of this clone draw without a network",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    """Writes the page, and prints what was written."""
    started = time.monotonic()
    root = Path.cwd()
    if arguments.dvc_plots:
        print(f"{write_template(root)}: DVC's plots draw without a network")
        return
    if arguments.output.is_dir():
        raise UserError(f"--output {arguments.output} is a folder; expected the path of a file")
    runs = [find_run(name, root) for name in dict.fromkeys(arguments.runs)] or all_runs(root)
    if not runs:
        raise UserError("there are no runs to report: `dvc repro` or `dvc exp run` makes one")
    try:
        num_bytes = write_report(runs, arguments.output)
    except OSError as error:
        raise FileError(f"cannot write {arguments.output}: {one_line(error)}") from None
    names = f"{len(runs)} runs" if len(runs) > 1 else f"the run {runs[0].name}"
    seconds = time.monotonic() - started
    print(f"{arguments.output}: {names}, {num_bytes / 1e6:.1f} MB, in {seconds:.1f} s. Open it in a browser.")


def all_runs(root: Path) -> list[Run]:
    """All DVC experiments, the last commit, and the workspace; the last two only if they have results of their own."""
    found = experiments(root)
    known = {_results(each) for each in found} | {(None, None)}
    if git(root, "rev-parse", "--verify", "--quiet", "HEAD") is not None:
        commit = str(git(root, "rev-parse", "--short=7", "HEAD"))
        found += [each for each in [find_run(commit, root)] if _results(each) not in known]
        known |= {_results(each) for each in found}
    return found + [each for each in [find_run(WORKSPACE, root)] if _results(each) not in known]


def _results(each: Run) -> tuple[bytes | None, bytes | None]:
    train, evaluate = (each.files.read(f"reports/{stage}/metrics.json") for stage in ("train", "evaluate"))
    return train, evaluate
