"""Loads params.yaml as DVC does, and checks all of it before any work starts."""

import difflib
import json
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, MinLen
from pydantic import ConfigDict, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError

from gpt2.config import (
    GPT2_VOCAB_SIZE,
    CorpusConfig,
    EvaluateConfig,
    GPTConfig,
    Rule,
    TokenizeConfig,
    TrainConfig,
    violations,
)
from gpt2.data.limit import EXPECTED_LIMIT, is_limit
from gpt2.data.sources.download import KNOWN
from gpt2.errors import UserError, one_line

MAX_SHOWN_CHARACTERS = 80
EXPECTED = "; expected "
RENAMED = {"train.accumulation_steps": "train.gradient_accumulation_steps"}
"""Keys of earlier versions."""
PYDANTIC_PARTS = ("constrained-", "literal[", "list[")
"""What pydantic adds to the place of a value: the one of several types that it tried."""
CHECKS = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class ExportConfig:
    """The Space. title: heading of its page. examples: example prompts; None uses the prompts of the evaluation.

    target: its hardware, a CPU or Hugging Face's ZeroGPU.
    """

    title: Annotated[str, MinLen(1)]
    examples: Annotated[list[str], MinLen(1)] | None
    target: Literal["cpu", "zerogpu"]


@dataclass(frozen=True)
class RuntimeConfig:
    """Settings that do not change the results. No stage depends on them, so a change reruns nothing.

    processes: that train together; "auto" is one for each CUDA device, otherwise 1. strategy: of several processes,
    `gpt2.distributed.models`; "auto" shards the model where it does not fit one device.
    precision, compile: "auto" measures what is faster here. gradient_checkpointing: less memory, more time.
    threads: CPU threads; None takes all cores, one stage of this repository at a time (`stages.cores`).
    log_interval: steps between rows of the history. checkpoint_interval: steps between checkpoints, in addition to
    checkpoints by time; None is by time only. checkpoint_folder: None is `checkpoints/`, or the mounted Drive on Colab.
    """

    device: Literal["auto", "cuda", "mps", "cpu"]
    processes: Literal["auto"] | Annotated[int, Gt(0)]
    strategy: Literal["auto", "ddp", "fsdp"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    compile: Literal["auto", "always", "never"]
    gradient_checkpointing: bool
    threads: Annotated[int, Gt(0)] | None
    log_interval: Annotated[int, Gt(0)]
    checkpoint_interval: Annotated[int, Gt(0)] | None
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


RULES = (
    Rule(
        ("corpus.fallback",),
        lambda fallback: fallback in (None, *KNOWN),
        "corpus.fallback is {0!r}; expected null or one of " + ", ".join(KNOWN),
    ),
    Rule(("corpus.limit",), is_limit, f"corpus.limit is {{0!r}}; expected {EXPECTED_LIMIT}"),
    Rule(
        ("model.vocab_size",),
        lambda vocab_size: vocab_size >= GPT2_VOCAB_SIZE,
        f"model.vocab_size {{0}} is less than the tokenizer's {GPT2_VOCAB_SIZE}",
    ),
    Rule(
        ("train.sequence_length", "model.block_size"),
        lambda sequence_length, block_size: sequence_length <= block_size,
        "train.sequence_length {0} is over the context, model.block_size {1}",
    ),
    Rule(
        ("train.freeze_layers", "model.n_layer"),
        lambda freeze_layers, n_layer: freeze_layers < n_layer,
        "train.freeze_layers {0} leaves no block to train; it has to be less than model.n_layer {1}",
    ),
)
"""Rules across sections."""


def load_params(path: Path) -> Params:
    """The checked parameters.

    Raises UserError that names all problems, each with section, key, value and what is allowed.
    """
    return check_params(read_yaml(path, "create it from a preset: make preset NAME=laptop"), str(path))


def read_yaml(path: Path, remedy: str) -> Any:
    """The content of a YAML file, read as DVC does. remedy: what to do if it is missing. Raises UserError."""
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        json.dumps(content, default=str)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {remedy}") from None
    except DuplicateKeyError as error:
        raise UserError(f"{path}: {error.problem} on line {error.problem_mark.line + 1}; delete one of them") from None
    except Exception as error:  # a YAML parser raises many types of errors
        raise UserError(f"cannot read {path}: {one_line(error)}") from None
    return content


def check_params(content: Any, name: str) -> Params:
    """The parameters of a params file that is read already. name: of the file, for messages. Raises UserError."""
    # through JSON, because only there strict checks accept a dict for a dataclass
    as_json = json.dumps(content, default=str)
    problems: list[tuple[tuple[str, ...], str]] = []
    params = None
    try:
        params = TypeAdapter(Params).validate_json(as_json)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            if problem["type"] != "value_error":  # a violated rule; _broken_rules reports all of them
                place, text = _describe(problem)
                if problems and text.partition(EXPECTED)[0] == problems[-1][1].partition(EXPECTED)[0]:
                    # the value is none of several types
                    text = f"{problems.pop()[1]} or {text.partition(EXPECTED)[2]}"
                elif problems and _is_inside(text, *problems[-1]):
                    problems.pop()  # of several types, the value has this one
                problems.append((place, text))
    wrong = {place for place, _ in problems}
    # a misspelled key is one problem, not also a missing key
    messages = [text for place, text in problems if not (text.endswith(" is missing") and _is_meant(place, problems))]
    messages += _broken_rules(content, wrong)
    if params is not None and not messages:
        return params
    if len(messages) == 1:
        raise UserError(f"{name}: {messages[0]}")
    raise UserError(f"{name} has {len(messages)} problems:\n  " + "\n  ".join(messages))


def _broken_rules(content: Any, wrong: set[tuple[str, ...]]) -> list[str]:
    """Messages of violated rules, within and across sections. Skips rules whose values are invalid."""
    messages = []
    values: dict[str, Any] = {}
    for section in fields(Params):
        given = content.get(section.name) if isinstance(content, dict) else None
        if not isinstance(given, dict) or (section.name,) in wrong:
            continue
        right = {key: value for key, value in given.items() if (section.name, key) not in wrong}
        assert isinstance(section.type, type)
        messages += [f"{section.name}: {text}" for text in violations(getattr(section.type, "RULES", ()), right)]
        values |= {f"{section.name}.{key}": value for key, value in right.items()}
    return messages + violations(RULES, values)


def _describe(problem: Any) -> tuple[tuple[str, ...], str]:
    """Section and key of an error of pydantic, and its message in terms of params.yaml."""
    place = tuple(str(part) for part in problem["loc"] if not str(part).startswith(PYDANTIC_PARTS))
    *section, key = place or ("",)
    name = ".".join(place)
    value = _shortened(problem["input"])
    match problem["type"]:
        case "unexpected_keyword_argument" if name in RENAMED:
            return place, f"{name} was renamed to {RENAMED[name]}"
        case "unexpected_keyword_argument":
            return place, f"unknown key {name}{did_you_mean(key, _keys(section))}"
        case "missing":
            return place, f"{name} is missing" if section else f"the section {name} is missing"
        case "dataclass_type" | "dataclass_exact_type":
            return place, f"{name or 'the file'} is {value}; expected a section with keys"
        case "float_type" if isinstance(problem["input"], str):
            return place, f"{name} is {value}, which is text; expected a number, written like 3.0e-4 without quotes"
    expected = (
        problem["msg"]
        .removeprefix("Input should be ")
        .replace("String should have ", "")
        .replace("List should have ", "a list with ")
        .replace(" after validation, not 0", "")
        .replace("a valid integer", "an integer")
        .replace("a valid array", "a list")
        .replace("a valid ", "a ")
    )
    return place[:2], f"{name} is {value}{EXPECTED}{expected}"


def _is_inside(text: str, place: tuple[str, ...], other: str) -> bool:
    """Whether a message is about an element of the list that another one, of this place, is about."""
    name = ".".join(place)
    return text.startswith(f"{name}.") and other.startswith(f"{name} is ")


def _shortened(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= MAX_SHOWN_CHARACTERS else f"{shown[:MAX_SHOWN_CHARACTERS]}..."


def _is_meant(place: tuple[str, ...], problems: list[tuple[tuple[str, ...], str]]) -> bool:
    """Whether another problem of the section is this key, misspelled or under a former name."""
    ends = (f"; did you mean {place[-1]!r}?", f" was renamed to {'.'.join(place)}")
    return any(other[:-1] == place[:-1] and text.endswith(ends) for other, text in problems)


def _keys(section: list[str]) -> list[str]:
    sections = {field.name: field.type for field in fields(Params)}
    if not section:
        return list(sections)
    config = sections.get(section[0])
    return [field.name for field in fields(config)] if isinstance(config, type) and is_dataclass(config) else []


def did_you_mean(word: str, known: Any) -> str:
    """The end of a message about an unknown word: the known word that is meant, if one is close."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
