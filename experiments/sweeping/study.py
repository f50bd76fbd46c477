"""The Optuna study of a sweep: which values a trial gets, who runs it, and whether it goes on.

Several workers share a study. A worker holds the lock file of its trial, so a trial that runs without a holder was
killed; the next worker takes it over, with the same number and the same values. Trials of other machines, which may not
share the folder, are taken over when they have not said for STALE_S that they run.
"""

import json
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.sweeping.config import PrunerConfig, SweepConfig, try_params
from experiments.sweeping.space import grid, grid_size
from gpt2.errors import BusyError, UserError, one_line
from gpt2.files import file_lock

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

DATABASE = "optuna.db"
DATABASE_WAIT_S = 30.0
STALE_S = 120.0
MAX_REJECTED = 1000
"""Suggestions in a row that do not fit together or run already."""
DEFINITION, WORKER, INVALID, SAME_AS = "sweep", "worker", "invalid", "same as trial"
"""Names of user attributes in Optuna."""


def storage_url(root: Path) -> str:
    """The address of Optuna's storage: OPTUNA_STORAGE, or a file of the repository."""
    return os.environ.get("OPTUNA_STORAGE") or f"sqlite:///{root / DATABASE}"


@contextmanager
def study_lock(root: Path, name: str) -> Iterator[None]:
    """Held for moments, while a trial is chosen or a study is created."""
    with file_lock(locks(root, name) / "study.lock", wait_s=60, what=f"the study {name!r}"):
        yield


def locks(root: Path, name: str) -> Path:
    """The folder of a study's lock files and logs."""
    return root / ".dvc/tmp/sweeps" / name


@contextmanager
def storage_errors(root: Path) -> Iterator[None]:
    """Errors of the database as UserError."""
    from sqlalchemy.exc import SQLAlchemyError

    where = os.environ.get("OPTUNA_STORAGE", "").rpartition("@")[2] or str(root / DATABASE)
    try:
        yield
    except SQLAlchemyError as error:
        cause = one_line(getattr(error, "orig", None) or error)
        remedy = "close the program that holds it" if "locked" in cause else "see OPTUNA_STORAGE, or move the file away"
        raise UserError(f"cannot use the studies in {where}: {cause}; {remedy}") from None
    except (RuntimeError, ImportError) as error:  # of another version of Optuna, or a missing driver
        raise UserError(f"cannot use the studies in {where}: {one_line(error)}") from None


def open_storage(root: Path) -> "optuna.storages.RDBStorage":
    """The storage, created if it is missing. Raises UserError."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = storage_url(root)
    if "://" not in url:
        raise UserError(f"OPTUNA_STORAGE is {url!r}; expected an address such as sqlite:////absolute/path/optuna.db")
    options = {"connect_args": {"timeout": DATABASE_WAIT_S}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    with storage_errors(root), file_lock(root / ".dvc/tmp/optuna.lock", wait_s=60):
        return optuna.storages.RDBStorage(url, engine_kwargs=options)


class SweepStudy:
    """A sweep's study, for one process. `definition`: what does not change while it goes on."""

    def __init__(self, root: Path, config: SweepConfig, base: Any) -> None:
        """base: the content of params.yaml without the values of a trial."""
        self.root, self.config, self.base = root, config, base
        self.storage = open_storage(root)
        self.study: optuna.Study | None = None

    def find(self) -> dict[str, Any] | None:
        """The definition of the study; None if there is no study of this name. Raises UserError if it is another."""
        import optuna

        with storage_errors(self.root):
            try:
                study = optuna.load_study(
                    study_name=self.config.name, storage=self.storage, pruner=make_pruner(self.config.pruner)
                )
            except KeyError:
                return None
            stored = study.user_attrs.get(DEFINITION)
            name = self.config.name
            if not isinstance(stored, dict) or "identity" not in stored:
                raise UserError(f"the study {name!r} was not made by a sweep; give sweep.yaml another name")
            now = json.loads(json.dumps(self.config.identity()))
            for key, value in now.items():
                if (then := stored["identity"].get(key)) != value:
                    raise UserError(
                        f"the study {name!r} was started with another {key}, {json.dumps(then)}; give sweep.yaml "
                        "another name, or restore it"
                    )
        self.study = study
        return stored

    def create(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Creates the study with facts beside its definition, which it returns. Raises UserError."""
        import optuna
        from optuna.study import StudyDirection

        definition = {"identity": self.config.identity(), **facts}
        with storage_errors(self.root):
            study = optuna.create_study(
                study_name=self.config.name,
                storage=self.storage,
                direction=StudyDirection[self.config.direction.upper()],
                pruner=make_pruner(self.config.pruner),
            )
            study.set_user_attr(DEFINITION, definition)
        self.study = study
        return definition

    @property
    def optuna(self) -> "optuna.Study":
        """Optuna's study."""
        assert self.study is not None
        return self.study

    def counted(self) -> "list[FrozenTrial]":
        """The trials that count: those that do not fail."""
        return [trial for trial in self.optuna.get_trials(deepcopy=False) if trial.state.name != "FAIL"]

    def budget(self) -> int | None:
        """The number of trials; None is no limit."""
        if self.config.sampler.name == "grid":
            size = grid_size(self.config.space)
            return min(size, self.config.trials or size)
        return self.config.trials

    def next_trial(self, held: ExitStack) -> "Trial | None":
        """A trial to run: one whose worker was killed, or a new one; None if the budget is spent.

        A trial with the values of an earlier one gets its numbers at once. held: takes the lock of the trial. Raises
        UserError if the space has no values that fit together.
        """
        from optuna.trial import TrialState

        problem: Any = "others run with the same values"
        with storage_errors(self.root), study_lock(self.root, self.config.name):
            if trial := self._take_over(held):
                return trial
            for _ in range(MAX_REJECTED):
                trials, budget = self.counted(), self.budget()
                if budget is not None and len(trials) >= budget:
                    return None
                trial = self._ask()
                if trial is None:
                    return None
                twin = next((other for other in trials if other.params == trial.params), None)
                if isinstance(problem := try_params(self.config, self.base, trial.params), str):
                    trial.set_user_attr(INVALID, problem)
                elif twin is None:
                    self._claim(trial, held)
                    return trial
                elif twin.state.is_finished():
                    trial.set_user_attr(SAME_AS, twin.user_attrs.get(SAME_AS, twin.number))
                    self.optuna.tell(trial, twin.value if twin.state.name == "COMPLETE" else None, twin.state)
                    continue
                self.optuna.tell(trial, state=TrialState.FAIL)
        raise UserError(f"the sampler found no values to try in {MAX_REJECTED} attempts: {problem}")

    def _ask(self) -> "Trial | None":
        """A trial with the sampler's values, or with the next ones of a grid; None if the grid is complete."""
        trials = self.optuna.get_trials(deepcopy=False)
        if self.config.sampler.name == "grid":
            tried = [trial.params for trial in trials]
            fitting = (values for values in grid(self.config.space) if values not in tried)
            values = next(
                (each for each in fitting if not isinstance(try_params(self.config, self.base, each), str)), None
            )
            if values is None:
                return None
            self.optuna.enqueue_trial(values)
        self.optuna.sampler = make_sampler(self.config, len(trials))
        return self.optuna.ask({name: param.distribution() for name, param in self.config.space.items()})

    def _take_over(self, held: ExitStack) -> "Trial | None":
        import optuna

        for frozen in self.optuna.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            worker = frozen.user_attrs.get(WORKER, {})
            elsewhere = worker.get("host", socket.gethostname()) != socket.gethostname()
            if elsewhere and time.time() - worker.get("seen", 0) < STALE_S:
                continue
            trial = optuna.trial.Trial(self.optuna, frozen._trial_id)
            try:
                self._claim(trial, held)
            except BusyError:
                continue
            return trial
        return None

    def _claim(self, trial: "Trial", held: ExitStack) -> None:
        lock = locks(self.root, self.config.name) / f"trial-{trial.number:03d}.lock"
        held.enter_context(file_lock(lock, what=f"trial {trial.number}"))
        self.show_alive(trial)

    def show_alive(self, trial: "Trial") -> None:
        """Says to workers on other machines that the trial runs."""
        worker = {"host": socket.gethostname(), "pid": os.getpid(), "seen": time.time()}
        trial.set_user_attr(WORKER, worker)


def make_sampler(config: SweepConfig, asked: int) -> "optuna.samplers.BaseSampler":
    """The sampler of the next trial. asked: number of trials before it, of all workers, part of the seed.

    A sampler knows all trials of the study, but its random numbers would repeat in each worker.
    """
    import numpy as np
    from optuna import samplers
    from optuna.exceptions import ExperimentalWarning

    seed = int(np.random.SeedSequence([config.sampler.seed, asked]).generate_state(1)[0])  # adjacent seeds are alike
    startup = config.sampler.startup_trials
    match config.sampler.name:
        case "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)
        case "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=startup)
        case "qmc":
            warnings.simplefilter("ignore", ExperimentalWarning)
            # numbers of its sequence, which the study counts
            return samplers.QMCSampler(seed=config.sampler.seed, scramble=True, warn_independent_sampling=False)
        case _:
            return samplers.RandomSampler(seed=seed)  # "random"; a grid draws nothing


def make_pruner(config: PrunerConfig) -> "optuna.pruners.BasePruner":
    """The pruner, which sees the validation loss by step."""
    from optuna import pruners
    from optuna.exceptions import ExperimentalWarning

    match config.name:
        case "asha":  # https://arxiv.org/abs/1810.05934
            return pruners.SuccessiveHalvingPruner(
                min_resource=config.min_steps, reduction_factor=config.reduction_factor, min_early_stopping_rate=0
            )
        case "median":
            return pruners.MedianPruner(n_startup_trials=config.startup_trials, n_warmup_steps=config.min_steps - 1)
        case "wilcoxon":  # pairs the losses of a trial with the best trial's at the same steps
            warnings.simplefilter("ignore", ExperimentalWarning)  # it has kept its interface for years
            return pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=max(2, config.startup_trials))
        case _:
            return pruners.NopPruner()


def best_of(trials: "list[FrozenTrial]", direction: str) -> "FrozenTrial | None":
    """The complete trial with the best value."""
    complete = [trial for trial in trials if trial.state.name == "COMPLETE" and trial.value is not None]
    sign = 1 if direction == "minimize" else -1
    return min(complete, key=lambda trial: sign * float(trial.value or 0.0), default=None)
