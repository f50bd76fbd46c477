"""`python -m gpt2 compare`: which run is better, and is the difference more than luck?"""

import argparse
from pathlib import Path

from experiments.runs import find_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="an experiment, branch, tag, commit or MLflow run's id")


def run(arguments: argparse.Namespace) -> None:
    """Prints the comparison."""
    for name in arguments.runs:
        found = find_run(name, Path.cwd())
        print(found.name, found.evaluate_metrics.get("loss"))
