"""train: the token files become a model. Continues from the newest checkpoint of the same run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from ruamel.yaml import YAML

from gpt2.data.token_files import read_meta
from gpt2.errors import DivergedError
from gpt2.files import file_lock, fingerprint, write_json
from stages import paths, preflight, tracking
from stages.cores import reserve_cores
from stages.params import Params, load_params
from stages.process import StopSignal, run_stage

DIVERGED_FILE = "diverged.json"
MAX_DIVERGENCES = 2


def main(stop: StopSignal) -> None:
    """Check, set up, train, write."""
    plan = check(load_params(paths.PARAMS))
    runtime = plan.params.runtime
    with file_lock(plan.folder / "lock"), limit_repeated_divergence(plan.folder), reserve_cores(runtime, stop):
        with stop.exit_immediately():  # importing torch takes seconds, and checking needs none of it
            from stages import session
        run = session.set_up(plan, stop)
        with tracking.start_run(
            plan.params, "train", run.ids, stop, events=run.logged_events(), system_metrics=True
        ) as tracker:
            session.train(run, tracker, stop)
            session.write_results(run, tracker)


def check(params: Params) -> preflight.Plan:
    """Checks memory and disk, before torch is imported. Raises UserError or FileError."""
    micro_batch_size = preflight.micro_batch_that_fits(params)
    meta = read_meta(paths.TOKENS)
    identity = {"model": asdict(params.model), "train": asdict(params.train), "tokens": meta["splits"]}
    folder = paths.checkpoints(params.runtime.checkpoint_folder) / fingerprint(identity, training_sources())
    preflight.check_disk(params, folder)
    return preflight.Plan(params, meta, folder, micro_batch_size)


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
