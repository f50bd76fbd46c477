"""The long version of the fault injection tests: `make soak`. Prints a table, and all failures."""

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.commands import PHASES, Trained, kills, signals
from tests.faults.corruption import corruption
from tests.faults.crash_points import crash_points
from tests.faults.fuzz import corpora, params_files, source_files
from tests.faults.non_finite import non_finite
from tests.faults.orphans import orphaned_processes
from tests.faults.result import Result
from tests.faults.tokenizing import killed_tokenizing
from tests.faults.tracking import tracking_faults
from tests.faults.workers import killed_workers, stopped_workers, training_in


def main() -> int:
    """Returns the exit code: 1 if there was a failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--kills", type=int, default=200, help="number of kills of the real command line (default: %(default)s)"
    )
    parser.add_argument("--orphaned-processes", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained = Trained(folder / "trained")
        in_ddp = functools.cache(lambda: training_in(folder / "in-ddp", "ddp"))
        both = [(phase, through_dvc) for phase in PHASES for through_dvc in (False, True)]
        campaigns: list[Callable[[], Result]] = [
            lambda: crash_points(folder / "crash"),
            lambda: corruption(folder / "corruption", 500, arguments.seed),
            lambda: non_finite(folder / "non-finite", 150, arguments.seed),
            lambda: corpora(folder / "corpora", 300, arguments.seed),
            lambda: source_files(folder / "sources", 1000, arguments.seed),
            lambda: params_files(folder / "params", 500, arguments.seed),
            lambda: killed_tokenizing(folder / "tokenizing", 50, arguments.seed),
            lambda: signals(folder, trained, both, within_s=2.0),
            lambda: tracking_faults(folder, trained),
            lambda: orphaned_processes(folder, trained, arguments.orphaned_processes, arguments.seed, within_s=5.0),
            lambda: kills(folder, trained, arguments.kills, arguments.seed),
            lambda: killed_workers(folder / "ddp", in_ddp(), 10, arguments.seed),
            lambda: killed_workers(folder / "fsdp", training_in(folder / "in-fsdp", "fsdp"), 10, arguments.seed),
            lambda: stopped_workers(folder, in_ddp(), 50, arguments.seed, within_s=5.0),
        ]
        lines, failures = [], 0
        print("| what | cases | failures | seconds |\n|---|---|---|---|", flush=True)
        for campaign in campaigns:
            started_s = time.monotonic()
            result = campaign()
            failures += len(result.failures)
            seconds = time.monotonic() - started_s
            print(f"| {result.name} | {result.cases} | {len(result.failures)} | {seconds:.0f} |", flush=True)
            lines += [f"{result.name}: {line}" for line in (*result.failures, *result.notes)]
    print("\n" + "\n".join(lines))
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
