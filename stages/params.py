"""params.yaml: read as DVC reads it, checked whole before any work starts."""

import difflib
import json
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, MinLen
from pydantic import ConfigDict, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from gpt2.config import (
    GPT2_VOCAB_SIZE,
    CorpusConfig,
    EvaluateConfig,
    GPTConfig,
    TokenizeConfig,
    TrainConfig,
)
from gpt2.corpus import KNOWN
from gpt2.errors import UserError

CHECKS = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class ExportConfig:
    """The Space's page. title: its heading; examples: prompts to click on, None takes those of the evaluation."""

    title: Annotated[str, MinLen(1)]
    examples: Annotated[list[str], MinLen(1)] | None


@dataclass(frozen=True)
class RuntimeConfig:
    """What does not decide the results, and is in no stage's params: a change reruns nothing.

    precision, compile: "auto" measures what is worth it here. gradient_checkpointing: less memory, more time.
    threads: of the CPU; None leaves it to torch. log_interval: steps between rows of the history.
    checkpoint_folder: None is `checkpoints/`, or the mounted Drive on Colab.
    """

    device: Literal["auto", "cuda", "mps", "cpu"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    compile: Literal["auto", "always", "never"]
    gradient_checkpointing: bool
    threads: Annotated[int, Gt(0)] | None
    log_interval: Annotated[int, Gt(0)]
    checkpoint_folder: Annotated[str, MinLen(1)] | None


@dataclass(frozen=True)
class Params:
    """All of params.yaml, a field for each section."""

    __pydantic_config__ = CHECKS

    corpus: CorpusConfig
    tokenize: TokenizeConfig
    model: GPTConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    export: ExportConfig
    runtime: RuntimeConfig

    def __post_init__(self) -> None:
        if self.corpus.fallback not in (None, *KNOWN):
            raise ValueError(f"corpus.fallback is {self.corpus.fallback!r}; expected null or one of {', '.join(KNOWN)}")
        if self.model.vocab_size < GPT2_VOCAB_SIZE:
            raise ValueError(f"model.vocab_size {self.model.vocab_size} is less than the tokenizer's {GPT2_VOCAB_SIZE}")
        if self.train.sequence_length > self.model.block_size:
            raise ValueError(
                f"train.sequence_length {self.train.sequence_length} is over the context, "
                f"model.block_size {self.model.block_size}"
            )


def load_params(path: Path) -> Params:
    """The checked parameters. Raises UserError that names each problem's section, key, value and what is allowed."""
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; take one from presets/: make preset NAME=laptop") from None
    except DuplicateKeyError as error:
        raise UserError(f"{path}: {error.problem} on line {error.problem_mark.line + 1}; delete one of them") from None
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    for key in fields(Params):
        if isinstance(content, dict) and key.name not in content:
            raise UserError(f"{path}: the section {key.name!r} is missing{_did_you_mean(key.name, content)}")
    try:
        # by way of JSON, as strict checks take a dict for a dataclass only there
        return TypeAdapter(Params).validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors(include_url=False)]
        # a misspelt key is one mistake, not also a missing one
        problems = [p for p in problems if not any(_names_as_meant(other, p) for other in problems)]
        if len(problems) == 1:
            raise UserError(f"{path}: {problems[0]}") from None
        raise UserError(f"{path} has {len(problems)} problems:\n  " + "\n  ".join(problems)) from None


def _describe(problem: Any) -> str:
    """A problem that pydantic found, in the terms of params.yaml."""
    *section, key = [str(part) for part in problem["loc"] if not str(part).startswith("constrained-")] or [""]
    name = ".".join([*section, key])
    value = problem["input"]
    match problem["type"]:
        case "unexpected_keyword_argument":
            return f"unknown key {name}{_did_you_mean(key, _keys(section))}"
        case "missing":
            return f"{name} is missing"
        case "value_error":
            message = str(problem["ctx"]["error"])
            return f"{name}: {message}" if name else message
        case "dataclass_type":
            return f"{name or 'the file'} is {value!r}; expected a section with keys"
        case "float_type" if isinstance(value, str):
            return f"{name} is {value!r}, which is text; expected a number, written like 3.0e-4 without quotes"
    expected = (
        problem["msg"]
        .removeprefix("Input should be ")
        .replace("a valid integer", "an integer")
        .replace("a valid ", "a ")
    )
    return f"{name} is {value!r}; expected {expected}"


def _names_as_meant(problem: str, missing: str) -> bool:
    """Whether `problem` says that the key which `missing` misses was meant."""
    unknown, _, meant = problem.partition("; did you mean ")
    section = unknown.removeprefix("unknown key ").rpartition(".")[0]
    return bool(meant) and missing == f"{section}.{meant[1:-2]} is missing"


def _keys(section: list[str]) -> list[str]:
    sections = {field.name: field.type for field in fields(Params)}
    if not section:
        return list(sections)
    config = sections.get(section[0])
    return [field.name for field in fields(config)] if isinstance(config, type) and is_dataclass(config) else []


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
