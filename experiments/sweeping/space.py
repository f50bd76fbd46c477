"""The search space of a sweep: ranges and lists of values of params."""

import copy
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.errors import UserError
from stages.params import did_you_mean

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

RANGE_KEYS = ("low", "high", "log", "step")
GRID_LIMIT = 10_000
LINK = ", "
"""Between the names of params that change together."""


@dataclass(frozen=True)
class Choices:
    """One of several values. Those of params that change together are JSON (`expanded`)."""

    values: tuple[Any, ...]

    def ends(self) -> tuple[Any, ...]:
        """The values to check before anything runs: all."""
        return self.values

    def grid(self) -> tuple[Any, ...] | None:
        """All values."""
        return self.values

    def distribution(self) -> "BaseDistribution":
        """For Optuna."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)

    def sample(self, generator: random.Random) -> Any:
        """A random value."""
        return generator.choice(self.values)

    def to_json(self) -> Any:
        """As in sweep.yaml."""
        return list(self.values)

    def __str__(self) -> str:
        return ", ".join(map(str, self.values))


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included: integers if both are. log: uniform in the logarithm.

    step: distance of neighbouring values; None is 1 for integers, and continuous otherwise.
    """

    low: float
    high: float
    log: bool
    step: float | None

    @property
    def is_integer(self) -> bool:
        """Whether the values are integers."""
        return type(self.low) is int and type(self.high) is int

    def ends(self) -> tuple[Any, ...]:
        """The values to check before anything runs: lowest and highest."""
        return self.low, self.high

    def grid(self) -> tuple[Any, ...] | None:
        """All values; None if there are too many to list."""
        step = self.step or (1 if self.is_integer and not self.log else None)
        if step is None:
            return None
        count = math.floor((self.high - self.low) / step * (1 + 1e-12)) + 1
        return None if count > GRID_LIMIT else tuple(round(self.low + index * step, 12) for index in range(count))

    def distribution(self) -> "BaseDistribution":
        """For Optuna."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.is_integer:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(float(self.low), float(self.high), log=self.log, step=self.step)

    def sample(self, generator: random.Random) -> Any:
        """A random value."""
        if (values := self.grid()) is not None:
            return generator.choice(values)
        if self.log:
            value = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = generator.uniform(self.low, self.high)
        return round(value) if self.is_integer else min(max(value, self.low), self.high)

    def to_json(self) -> Any:
        """As in sweep.yaml."""
        return {"low": self.low, "high": self.high, "log": self.log, "step": self.step}

    def __str__(self) -> str:
        end = ", log" if self.log else ""
        return f"{self.low} to {self.high}{end}{f', step {self.step}' if self.step else ''}"


Param = Choices | Range


def read_space(path: Path, content: Any, base: Any) -> dict[str, Param]:
    """The params of the section `space`. base: the content of params.yaml. Raises UserError."""
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: space is {content!r}; expected params with their ranges or lists of values")
    space: dict[str, Param] = {}
    for name, value in content.items():
        if "," in str(name):
            names = [part.strip() for part in str(name).split(",")]
            space[LINK.join(names)] = _read_linked(f"{path}: space.{name}", len(names), value)
            continue
        param = _read_param(f"{path}: space.{name}", value)
        section, _, key = str(name).partition(".")
        values = base.get(section)
        if isinstance(param, Range) and isinstance(values, dict) and type(values.get(key)) is float:
            param = replace(param, low=float(param.low), high=float(param.high))  # `high: 1` of a fraction means 1.0
        space[str(name)] = param
    return space


def expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by single params: {"model.n_layer, model.n_embd": "[4, 256]"} is {"model.n_layer": 4, ...}."""
    single: dict[str, Any] = {}
    for name, value in values.items():
        if LINK in name:
            single |= dict(zip(name.split(LINK), json.loads(value), strict=True))
        else:
            single[name] = value
    return single


def _read_linked(where: str, count: int, value: Any) -> Choices:
    if not isinstance(value, list) or len(value) < 2:
        raise UserError(f"{where} is {value!r}; expected at least two lists of {count} values")
    for each in value:
        if not isinstance(each, list) or len(each) != count or any(isinstance(part, list | dict) for part in each):
            raise UserError(f"{where} contains {each!r}; expected a list of {count} values, one for each of its params")
    if len(labels := {json.dumps(each) for each in value}) < len(value):
        raise UserError(f"{where} has {len(value) - len(labels)} values twice")
    return Choices(tuple(json.dumps(each) for each in value))


def _read_param(where: str, value: Any) -> Param:
    if isinstance(value, list):
        if len(value) < 2 or any(value[index] in value[:index] for index in range(len(value))):
            raise UserError(f"{where} is {value!r}; expected at least two different values")
        for each in value:
            if not isinstance(each, str | int | float | None):
                raise UserError(f"{where} contains {each!r}; expected numbers, texts, true, false or null")
        return Choices(tuple(value))
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r}; expected a list of values, or low and high; put a fixed value into set")
    for key in value:
        if key not in RANGE_KEYS:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(str(key), RANGE_KEYS)}")
    for key in ("low", "high"):
        if type(value.get(key)) not in (int, float) or not math.isfinite(value[key]):
            raise UserError(
                f"{where}: {key} is {value.get(key)!r}; expected a number, written like 3.0e-4 without quotes"
            )
    low, high, log, step = value["low"], value["high"], value.get("log", False), value.get("step")
    if low >= high:
        raise UserError(f"{where}: low {low} is not below high {high}; swap them, or put a fixed value into set")
    if not isinstance(log, bool):
        raise UserError(f"{where}: log is {log!r}; expected true or false")
    if log and (low <= 0 or step is not None):
        raise UserError(f"{where}: log needs a low over 0 and no step")
    if type(low) is not type(high):
        low, high = float(low), float(high)
    whole = type(low) is int
    if step is not None and (type(step) not in ((int,) if whole else (int, float)) or not 0 < step <= high - low):
        kind = "an integer" if whole else "a number"
        raise UserError(f"{where}: step is {step!r}; expected {kind} over 0, at most high - low")
    return Range(low, high, log, step)


def with_values(base: Any, values: Mapping[str, Any]) -> Any:
    """A copy of the content of params.yaml with other values. values: by `section.key`."""
    content = copy.deepcopy(base)
    for name, value in expanded(values).items():
        section, _, key = str(name).partition(".")
        part = content.setdefault(section, {})
        if isinstance(part, dict):
            part[key] = value
    return content


def grid(space: Mapping[str, Param]) -> Iterator[dict[str, Any]]:
    """All combinations of a space without continuous ranges."""
    values = [param.grid() or () for param in space.values()]
    for combination in itertools.product(*values):
        yield dict(zip(space, combination, strict=True))


def grid_size(space: Mapping[str, Param]) -> int:
    """The number of combinations."""
    return math.prod(len(param.grid() or ()) for param in space.values())
