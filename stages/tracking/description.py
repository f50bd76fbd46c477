"""What describes a run in MLflow: its name, params, tags, datasets, and a note in Markdown. MLflow is not used here."""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ruamel.yaml import YAML

from gpt2.data.token_files import split_sha256
from stages import overfitting, paths
from stages.params import Params
from stages.process import redact_secrets
from stages.tracking.protocol import PARENT_TAG

MAX_PARAM_CHARACTERS = 6000
"""MLflow refuses longer ones."""
MAX_DIGEST_CHARACTERS = 36
MAX_NAMED_PARAMS = 4
MAX_SAMPLE_CHARACTERS = 600
PARENT_VARIABLE = "GPT2_PARENT_RUN_ID"
"""The environment variable with the id of an MLflow run whose child this one becomes: that of a sweep."""
MLFLOW_RUN, TRAINING_RUN = "MLFLOW_RUN", "TRAINING_RUN"
RANDOM_NAME = re.compile(r"[a-z]{5}-[a-z]{4}")
"""The names that DVC gives to experiments without one, such as warty-wage."""
DEFAULT_PRESET = Path("presets/laptop.yaml")
SHORT = {
    "learning_rate": "lr",
    "min_learning_rate": "min lr",
    "muon_learning_rate": "muon lr",
    "max_steps": "steps",
    "batch_size": "batch",
    "gradient_accumulation_steps": "accumulation",
    "sequence_length": "sequence",
}
NAMES_ITSELF = ("optimizer", "schedule", "init_from", "source", "split")
"""Params whose value says which param it is."""
PICTURES = {
    "train": {"reports/train/loss.png": TRAINING_RUN},
    "evaluate": {
        "reports/train/loss.png": TRAINING_RUN,
        "reports/evaluate/breakdown.png": MLFLOW_RUN,
        "reports/evaluate/passage.png": MLFLOW_RUN,
    },
}
"""The pictures in the note of a stage, and which run has them: that of the stage, or that which trained the model."""


def flatten(params: Params) -> dict[str, str]:
    """params.yaml as MLflow's params, `section.key`; without `runtime`, which does not decide the results."""
    return {name: redact_secrets(str(value))[:MAX_PARAM_CHARACTERS] for name, value in _flat(asdict(params)).items()}


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, values in sections.items()
        if section != "runtime" and isinstance(values, dict)
        for key, value in values.items()
    }


def git_tags() -> dict[str, str]:
    """The commit, whether more than results and params (which are logged) differs from it, and the DVC experiment."""
    tags = {}
    if commit := _git("rev-parse", "HEAD"):
        changed = _git("status", "--porcelain", "--", ".", ":!reports", ":!dvc.lock", ":!params.yaml")
        tags = {"git.commit": commit, "git.dirty": str(bool(changed)).lower()}
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = experiment
    return tags


def parent_tag() -> dict[str, str]:
    """The tag of a run that belongs to another one, by `PARENT_VARIABLE`; empty for other runs."""
    parent = os.environ.get(PARENT_VARIABLE, "")
    return {PARENT_TAG: parent} if parent else {}


def run_name(params: Params) -> str | None:
    """The name of a run, the first of these that there is; None leaves it to MLflow.

    The name that the user chose for a DVC experiment; the preset that params.yaml is a copy of; what differs from the
    committed params.yaml, "lr 3e-3, adamw", or from the default preset; the name that DVC chose.
    """
    experiment = os.environ.get("DVC_EXP_NAME")
    if experiment and not RANDOM_NAME.fullmatch(experiment):
        return experiment
    ours = _flat(json.loads(json.dumps(asdict(params))))
    committed = _git("show", f"{os.environ.get('DVC_EXP_BASELINE_REV') or 'HEAD'}:./{paths.PARAMS}")
    return (
        _preset()
        or describe_changes(ours, _load(committed))
        or describe_changes(ours, _load(_content(DEFAULT_PRESET).decode(errors="replace")))
        or experiment
    )


def _preset() -> str | None:
    """The preset that params.yaml is a copy of."""
    presets = sorted(DEFAULT_PRESET.parent.glob("*.yaml"))
    content = _content(paths.PARAMS)
    return next((path.stem for path in presets if content and _content(path) == content), None)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _load(text: str) -> dict[str, Any]:
    try:
        content = YAML(typ="safe", pure=True).load(text)
    except Exception:  # a YAML parser raises many types of errors, and an old file may be damaged
        return {}
    return _flat(content) if isinstance(content, dict) else {}


def describe_changes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The params of `ours` that differ from `theirs`, in a short line: "lr 3e-3, muon". Empty if there are none.

    Params that only one of them has, of another version of the project, do not count.
    """
    changed = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    # what decides the result comes first
    changed.sort(key=lambda name: name.partition(".")[0] not in ("model", "train"))
    shown = [_describe(name.partition(".")[2], ours[name]) for name in changed[:MAX_NAMED_PARAMS]]
    rest = len(changed) - len(shown)
    return redact_secrets(", ".join(shown + [f"{rest} more"] * bool(rest)))


def _describe(key: str, value: Any) -> str:
    if isinstance(value, float):
        value = _short_number(value)
    elif key == "source":
        sources = value if isinstance(value, list) else [value]
        value = ", ".join(map(_file_name, sources))
    elif isinstance(value, bool | None):
        value = {None: "none", True: "on", False: "off"}[value]
    return str(value) if key in NAMES_ITSELF else f"{SHORT.get(key, key)} {value}"


def _file_name(source: Any) -> str:
    """The last part of a path or an address, without a query."""
    return redact_secrets(str(source)).partition("?")[0].rstrip("/").rpartition("/")[2]


def _short_number(value: float) -> str:
    """0.02, 3e-3, 6e-4, 1.5: as people write them."""
    if 0 < abs(value) < 0.01:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def datasets(index: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The corpus and the token files as MLflow's datasets: name, digest, source, profile, and what it is used for.

    index: of the token files. digest: the start of a SHA-256; MLflow allows no more.
    """
    corpus = json.loads(paths.CORPUS_FACTS.read_text(encoding="utf-8")) if paths.CORPUS_FACTS.is_file() else {}
    name, sources = corpus.get("name", "unknown"), str(corpus.get("source", "unknown"))
    found = []
    if corpus:
        profile = {
            key: corpus[key] for key in ("bytes", "characters", "lines", "documents", "licence") if key in corpus
        }
        profile = {"num_rows": corpus.get("documents"), **profile, "sha256": corpus["sha256"]}
        found.append(_dataset(name, corpus["sha256"], sources, profile, "corpus"))
    for split, context in (("train", "training"), ("val", "validation")):
        sums, facts = split_sha256(index, split), index["splits"][split]
        profile = {"num_rows": facts.get("documents"), "num_elements": facts["tokens"], "sha256": sums}
        found.append(_dataset(f"{name}, {context} tokens", sums, str(paths.TOKENS), profile, context))
    return found


def _dataset(name: str, digest: str, source: str, profile: dict[str, Any], context: str) -> dict[str, Any]:
    is_address = "://" in source
    return {
        "name": redact_secrets(name)[:500],
        "digest": digest[:MAX_DIGEST_CHARACTERS],
        "source_type": "http" if source.startswith(("http://", "https://")) else "local",
        "source": json.dumps({"url" if is_address else "uri": redact_secrets(source)}),
        "profile": json.dumps(profile),
        "context": context,
    }


def note(stage: str) -> str:
    """What the page of a run says first, in Markdown: key numbers, pictures, and a sample. Reads reports/.

    stage: after "train", the reports of the evaluation are those of an earlier run.
    """
    train = _read(paths.TRAIN_REPORT / "metrics.json")
    evaluation = _read(paths.EVALUATE_REPORT / "metrics.json") if stage != "train" else {}
    rows = _rows(train, evaluation)
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    if train.get("overfits"):
        lines += ["", f"**Warning:** {overfitting.warning(train)}."]
    experiment = os.environ.get("DVC_EXP_NAME")
    if experiment:
        lines += ["", f"To get it back: `dvc exp apply {experiment}`"]
    for picture, run in PICTURES["train" if stage == "train" else "evaluate"].items():
        address = f"get-artifact?path={quote(picture, safe='')}&run_uuid={run}"
        lines += ["", f"![{Path(picture).stem}]({address})"]
    samples = _read(paths.EVALUATE_REPORT / "samples.json") if stage != "train" else []
    if isinstance(samples, list) and samples:
        text = f"{samples[0].get('prompt', '')}{samples[0].get('sample', '')}"[:MAX_SAMPLE_CHARACTERS]
        lines += ["", "```text", text.replace("```", "'''"), "```"]
    return "\n".join(lines)


def _rows(train: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    loss = evaluation.get("loss", train.get("best_val_loss"))
    rows = [("validation loss", f"{loss:.4f} nats per token")] if loss is not None else []
    if "perplexity" in evaluation:
        rows.append(("perplexity", f"{evaluation['perplexity']:.2f}"))
    if "bits_per_byte" in evaluation:
        low, high = evaluation["bits_per_byte_low"], evaluation["bits_per_byte_high"]
        rows.append(("bits per byte", f"{evaluation['bits_per_byte']:.3f} ({low:.3f} to {high:.3f})"))
    if train.get("stopped_early"):
        rows.append(("stopped early", f"after step {train['steps']:,}"))
    if train.get("generalization_gap") is not None:
        rows.append(("generalization gap", f"{train['generalization_gap']:.3f} nats per token"))
    for name, key in (("parameters", "parameters"), ("training tokens", "tokens"), ("tokens/s", "tokens_per_s")):
        if train.get(key) is not None:
            rows.append((name, f"{train[key]:,}"))
    return rows


def _read(path: Path) -> Any:
    """The JSON in a file; empty if it is missing or damaged."""
    try:
        return json.loads(_content(path))
    except ValueError:
        return {}


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, errors="replace", check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository: what it would say is left out
        return ""
    return result.stdout.strip()
