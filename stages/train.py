"""train: the token files become a model. Continues from the newest checkpoint of the same run."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from gpt2.data.token_files import read_index
from gpt2.errors import DivergedError
from gpt2.files import file_lock, write_json
from stages import endings, paths, preflight, tracking, workers
from stages.cores import limit_busy_waiting, reserve_cores
from stages.params import Params, load_params
from stages.process import StopSignal, is_worker, run_stage

if TYPE_CHECKING:
    from gpt2.world import World

DIVERGED_FILE = "diverged.json"
MAX_DIVERGENCES = 2


def main(stop: StopSignal) -> None:
    """Trains in this process, or starts several. Torch's agent, and torchrun, start them with this function too."""
    params = load_params(paths.PARAMS)
    if is_worker():
        limit_busy_waiting()
        endings.run_worker(lambda world: train_together(params, world, stop), params.runtime, stop)
    elif (processes := workers.count(params)) > 1:
        check(params, processes)
        with reserve_cores(params.runtime, stop):
            workers.launch(processes, stop)
    else:
        plan = check(params)
        with lock(plan), reserve_cores(params.runtime, stop):
            train(plan, stop)


def train_together(params: Params, world: "World", stop: StopSignal) -> None:
    """What one of several processes does. Rank 0 writes the files."""
    workers.check_number(params, world.size)
    plan = check(params, world.local_size, world.size)
    workers.require_same(world, {**plan.identity, "code": fingerprint({}, training_sources())})
    with lock(plan) if world.rank == 0 else nullcontext():
        train(plan, stop, world)


def train(plan: preflight.Plan, stop: StopSignal, world: "World | None" = None) -> None:
    """Set up, train, write."""
    with stop.exit_immediately():  # importing torch takes seconds, and checking needs none of it
        from gpt2.world import ALONE
        from stages import results, session
    run = session.set_up(plan, stop, world or ALONE)
    with session.start_tracking(run, stop) as tracker:
        tracker.tags(results.run_tags(run))
        results.remember_environment(run)
        tracker.inputs(tracking.datasets(plan.tokens_index))
        session.train(run, tracker, stop)
        results.write_results(run, tracker)


@contextmanager
def lock(plan: preflight.Plan) -> Iterator[None]:
    """Only one run at a time trains from these checkpoints, and none that diverged twice."""
    with file_lock(plan.folder / "lock"), limit_repeated_divergence(plan.folder):
        yield


def check(params: Params, local_processes: int = 1, processes: int | None = None) -> preflight.Plan:
    """Checks memory and disk, before torch is imported. Raises UserError or FileError.

    local_processes: on this machine; they share its memory. processes: on all machines, if there are others.
    """
    micro_batch_size = preflight.micro_batch_that_fits(params, local_processes, processes or local_processes)
    index = read_index(paths.TOKENS)
    identity = {"model": asdict(params.model), "train": asdict(params.train), "tokens": index["splits"]}
    folder = paths.checkpoints(params.runtime.checkpoint_folder) / fingerprint(identity, training_sources())
    preflight.check_disk(params, folder)
    return preflight.Plan(params, index, folder, micro_batch_size, identity)


def fingerprint(facts: dict[str, Any], sources: Iterable[Path]) -> str:
    """A hash of everything that determines the numbers of a run: params, checksums of the data, source files."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for path in sorted(sources):
        digest.update(f"\0{path.as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def training_sources() -> list[Path]:
    """The library files that decide the numbers of a run: the gpt2 dependencies of this stage in dvc.yaml."""
    stages = YAML(typ="safe", pure=True).load(Path("dvc.yaml"))["stages"]
    deps = [Path(dep) for dep in stages["train"]["deps"] if dep.startswith("gpt2/")]
    return [file for dep in deps for file in (sorted(dep.rglob("*.py")) if dep.is_dir() else [dep])]


@contextmanager
def limit_repeated_divergence(folder: Path) -> Iterator[None]:
    """Refuses to start a run that diverged twice at the same step: a third attempt would end the same way."""
    path = folder / DIVERGED_FILE
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        good_steps, times, message = int(earlier["good_steps"]), int(earlier["times"]), str(earlier["message"])
    except (OSError, ValueError, KeyError, TypeError):
        good_steps, times, message = -1, 0, ""
    if times >= MAX_DIVERGENCES:
        raise DivergedError(
            f"{message}. This happened {times} times at the same step: change a parameter, or delete {folder} to try "
            "again",
            good_steps,
        )
    try:
        yield
    except DivergedError as error:
        times = times + 1 if error.good_steps == good_steps else 1
        write_json(path, {"good_steps": error.good_steps, "times": times, "message": str(error)})
        raise


if __name__ == "__main__":
    run_stage(main)
