"""sweep.yaml: what a sweep searches, by which objective, and for how long."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.sweeping.space import LINK, Choices, Param, Range, expanded, read_space, with_values
from gpt2.errors import UserError
from stages.params import Params, check_params, did_you_mean, read_yaml

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
LOSSES = (
    "train.best_val_loss",
    "train.last_val_loss",
    "evaluate.loss",
    "evaluate.perplexity",
    "evaluate.bits_per_byte",
)
"""Objectives that the validation loss during training foretells, so that a pruner may follow it."""
METRICS = {
    "train": (
        "best_val_loss",
        "last_val_loss",
        "last_train_loss",
        "tokens_per_s",
        "elapsed_s",
        "peak_memory_bytes",
    ),
    "evaluate": (
        "loss",
        "perplexity",
        "bits_per_byte",
        "top1_accuracy",
        "top5_accuracy",
        "ece",
        "contamination",
        "longest_verbatim_characters",
    ),
}
"""Numbers in reports/train/metrics.json and reports/evaluate/metrics.json that a sweep can optimize."""
SAMPLERS = ("tpe", "random", "grid", "gp", "qmc")
PRUNERS = ("asha", "median", "wilcoxon", "none")
KEYS = ("name", "objective", "direction", "sampler", "pruner", "budget", "set", "space")


@dataclass(frozen=True)
class SamplerConfig:
    """name: one of SAMPLERS. startup_trials: random ones, before the sampler learns from them."""

    name: str
    seed: int
    startup_trials: int


@dataclass(frozen=True)
class PrunerConfig:
    """name: one of PRUNERS. startup_trials: that are never pruned, of the pruner "median".

    min_steps: of training, before a trial may be pruned. reduction_factor: of ASHA: the best 1 of so many goes on.
    """

    name: str
    startup_trials: int
    min_steps: int
    reduction_factor: int


@dataclass(frozen=True)
class SweepConfig:
    """The content of sweep.yaml. trials, minutes: the budget; None is no limit.

    fixed: params of all trials (the key `set`). space: the params that are searched.
    """

    name: str
    objective: str
    direction: str
    sampler: SamplerConfig
    pruner: PrunerConfig
    trials: int | None
    minutes: float | None
    fixed: Mapping[str, Any]
    space: Mapping[str, Param]

    @property
    def stage(self) -> str:
        """The stage that writes the objective; a trial ends with it."""
        return self.objective.partition(".")[0]

    @property
    def metric(self) -> str:
        """The name of the objective in the metrics of its stage."""
        return self.objective.partition(".")[2]

    def identity(self) -> dict[str, Any]:
        """What may not change while a study goes on. The sampler, the pruner and the budget may."""
        return {
            "objective": self.objective,
            "direction": self.direction,
            "set": dict(self.fixed),
            "space": {name: param.to_json() for name, param in self.space.items()},
        }

    def params_of(self, base: Any, values: Mapping[str, Any]) -> Any:
        """The content of params.yaml of a trial. base: that of the workspace."""
        return with_values(base, {**self.fixed, **values})


class _Section:
    """A part of sweep.yaml that must have exactly the given keys."""

    def __init__(self, path: Path, name: str, content: Any, keys: tuple[str, ...]) -> None:
        self.path, self.name = path, name
        if not isinstance(content, dict):
            raise self.error("", f"is {content!r}; expected a section with the keys {', '.join(keys)}")
        for key in content:
            if key not in keys:
                raise UserError(f"{path}: unknown key {self._full(str(key))}{did_you_mean(str(key), keys)}")
        for key in keys:
            if key not in content:
                raise self.error(key, "is missing")
        self.content = content

    def _full(self, key: str) -> str:
        return ".".join(filter(None, (self.name, key)))

    def error(self, key: str, problem: str) -> UserError:
        return UserError(f"{self.path}: {self._full(key)} {problem}")

    def one_of(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.content[key]
        if value not in allowed:
            hint = did_you_mean(str(value), allowed)
            raise self.error(key, f"is {value!r}; expected one of {', '.join(allowed)}{hint}")
        return str(value)

    def integer(self, key: str, at_least: int) -> int:
        value = self.content[key]
        if type(value) is not int or value < at_least:
            raise self.error(key, f"is {value!r}; expected an integer of at least {at_least}")
        return value


def load_sweep(path: Path, params_path: Path) -> tuple[SweepConfig, Any]:
    """The checked sweep, and the content of params.yaml. Raises UserError, one line, for whatever is wrong."""
    base = read_yaml(params_path, "create it from a preset: make preset NAME=laptop")
    check_params(base, str(params_path))
    top = _Section(path, "", read_yaml(path, "docs/experiments.md describes it"), KEYS)
    name = top.content["name"]
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise top.error("name", f"is {name!r}; expected letters, digits, - and _, as in names of experiments")
    sampler = _Section(path, "sampler", top.content["sampler"], ("name", "seed", "startup_trials"))
    pruner = _Section(
        path, "pruner", top.content["pruner"], ("name", "startup_trials", "min_steps", "reduction_factor")
    )
    budget = _Section(path, "budget", top.content["budget"], ("trials", "minutes"))
    fixed = top.content["set"] or {}
    if not isinstance(fixed, dict):
        raise top.error("set", f"is {fixed!r}; expected params and their values, or null")
    minutes = budget.content["minutes"]
    if minutes is not None and (type(minutes) not in (int, float) or not 0 < minutes < math.inf):
        raise budget.error("minutes", f"is {minutes!r}; expected a positive number or null")
    config = SweepConfig(
        name=name,
        objective=_objective(top),
        direction=top.one_of("direction", ("minimize", "maximize")),
        sampler=SamplerConfig(
            sampler.one_of("name", SAMPLERS), sampler.integer("seed", 0), sampler.integer("startup_trials", 1)
        ),
        pruner=PrunerConfig(
            pruner.one_of("name", PRUNERS),
            pruner.integer("startup_trials", 0),
            pruner.integer("min_steps", 1),
            pruner.integer("reduction_factor", 2),
        ),
        trials=None if budget.content["trials"] is None else budget.integer("trials", 1),
        minutes=minutes,
        fixed=fixed,
        space=read_space(path, top.content["space"], base),
    )
    _check(config, base, path)
    return config, base


def _objective(top: _Section) -> str:
    objective = top.content["objective"]
    known = [f"{stage}.{metric}" for stage, metrics in METRICS.items() for metric in metrics]
    if objective not in known:
        names = [name.partition(".")[2] for name in known]
        same = [name for name in known if name.partition(".")[2] == objective]
        hint = f"; did you mean {same[0]!r}?" if same else did_you_mean(str(objective), [*known, *names])
        raise top.error("objective", f"is {objective!r}, which no stage writes{hint or '; known: ' + ', '.join(known)}")
    return str(objective)


def _check(config: SweepConfig, base: Any, path: Path) -> None:
    """Raises UserError if the parts do not fit together, or a value is not allowed in params.yaml."""
    if config.pruner.name != "none" and not (config.objective in LOSSES and config.direction == "minimize"):
        raise UserError(
            f"{path}: pruner.name is {config.pruner.name!r}, which follows the validation loss and cannot foretell "
            f"{config.direction} {config.objective}; set it to none"
        )
    if config.sampler.name == "grid":
        for name, param in config.space.items():
            if param.grid() is None:
                raise UserError(
                    f"{path}: sampler.name is 'grid', but space.{name} is continuous; give it a step or a list"
                )
    elif config.trials is None and config.minutes is None:
        raise UserError(f"{path}: budget has neither trials nor minutes; set one of them")
    names = [*config.fixed, *(name for linked in config.space for name in linked.split(LINK))]
    if both := sorted(name for name in set(names) if names.count(name) > 1):
        raise UserError(f"{path}: {both[0]} stands twice in set and space; delete one of them")
    known = [f"{section}.{key}" for section, values in base.items() for key in values]
    for name in names:
        if "." not in str(name):
            meant = [each for each in known if each.partition(".")[2] == name]
            hint = f"; did you mean {meant[0]!r}?" if meant else did_you_mean(str(name), known)
            raise UserError(f"{path}: {name!r} is no param{hint or '; write section.key'}")
        if str(name).partition(".")[0] == "runtime":
            raise UserError(f"{path}: {name} does not change the results; set it in params.yaml")
    for name, value in config.fixed.items():
        _check_value(config, base, f"{path}: set: ", {name: value})
    for name, param in config.space.items():
        for value in param.ends():
            for single, part in expanded({name: value}).items():
                _check_value(config, base, f"{path}: space: ", {single: part})


def _check_value(config: SweepConfig, base: Any, where: str, values: Mapping[str, Any]) -> None:
    """Raises UserError if a value is not allowed, whatever the others are.

    Rules across params may hold for other combinations, so they are no errors here.
    """
    try:
        check_params(with_values(base, values), where)
    except UserError as error:
        (name,) = values
        for line in str(error).removeprefix(f"{where}: ").splitlines():
            if any(part in line for part in (f"{name} is {values[name]!r}", "unknown key", "was renamed")):
                raise UserError(f"{where}{line.strip()}") from None


def try_params(config: SweepConfig, base: Any, values: Mapping[str, Any]) -> Params | str:
    """The checked params of a trial, or why its values do not fit together."""
    try:
        return check_params(config.params_of(base, values), "params")
    except UserError as error:
        return " ".join(str(error).removeprefix("params: ").split())


__all__ = ["Choices", "Param", "Range", "SweepConfig", "load_sweep", "try_params"]
