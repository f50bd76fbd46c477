"""`python -m gpt2 reproduce`: trains a finished run again, from its commit and params, and compares the bits.

The run is an experiment, a branch, a tag, a commit, or the id of an MLflow run. Nothing is recorded: neither in MLflow
nor in DVC.
"""

import argparse
import csv
import io
import json
import shutil
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from experiments.recorded import Recorded, find_recorded
from experiments.worktree import Worktree, temporary_worktree
from gpt2.data.token_files import read_index, split_sha256
from gpt2.errors import GPT2Error, Interrupted, UserError, one_line
from gpt2.files import sha256_of
from stages import paths
from stages.cores import available, reserve_cores
from stages.environment import ENVIRONMENT_FILE, differences, machine, read_sessions
from stages.params import load_params
from stages.process import StopSignal, echo

SAME, DIFFERENT = 0, 1
WEIGHTS = {"model": "model.safetensors", "last_model": "last.safetensors"}
"""The files of models/, by the names of their sums."""
NUMBERS = ("train_loss", "val_loss", "learning_rate", "grad_norm")
"""The columns of the history that depend on bits alone."""
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = (
        "Train a finished run again, in a temporary checkout, and compare the weights. "
        "Exit code 0: the same bits; 1: other bits; 2: it cannot be trained again."
    )
    parser.add_argument("name", metavar="RUN", help="an experiment, branch, tag, commit, or the id of an MLflow run")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done, and what differs here")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="copy the trained model into this new folder")


def run(arguments: argparse.Namespace) -> int:
    """Reproduces a run. Returns the exit code. Raises UserError if it cannot, and Interrupted."""
    stop = StopSignal()
    if arguments.keep is not None and arguments.keep.exists():
        raise UserError(f"--keep: {arguments.keep} exists already; name a new folder")
    root = Path.cwd()
    try:
        recorded = find_recorded(arguments.name, root)
        with temporary_worktree(root, recorded.commit, stop) as worktree:
            return _reproduce(recorded, worktree, arguments)
    except (UserError, Interrupted):
        raise
    except (GPT2Error, OSError) as error:
        raise UserError(f"cannot reproduce {arguments.name}: {one_line(error)}") from None


def _reproduce(recorded: Recorded, worktree: Worktree, arguments: argparse.Namespace) -> int:
    echo(f"{recorded.run.name}: commit {recorded.commit[:7]}, {recorded.origin}")
    write_params(worktree.folder / paths.PARAMS, recorded)
    sums = recorded.sums or _sums_of_outputs(worktree)
    if "model" not in sums:
        raise UserError(
            f"{recorded.run.name} has no {paths.TRAIN_REPORT / ENVIRONMENT_FILE} with a sum of its weights, and DVC's "
            "cache does not have its models/; `dvc pull` may have it"
        )
    _explain(recorded)
    has_tokens = worktree.get(paths.TOKENS.as_posix())
    _check_code(recorded, worktree, has_tokens)
    if arguments.dry_run:
        where = "are in DVC's cache" if has_tokens else "will be pulled or made"
        minutes = recorded.run.train_metrics.get("elapsed_s", 0) / 60
        print(f"the tokens {where}; training took {minutes:.1f} minutes; the weights have SHA-256 {sums['model']}")
        return SAME
    if not has_tokens:
        _get_tokens(worktree, sums)
        _check_code(recorded, worktree)
    _check_tokens(worktree, sums)
    shutil.rmtree(worktree.folder / paths.TRAIN_REPORT, ignore_errors=True)
    with _turn(recorded, worktree):
        code = worktree.run_stage("train")
    if code:
        raise UserError(f"cannot reproduce {recorded.run.name}: its train stage ended with exit code {code}, see above")
    models = worktree.folder / paths.MODELS
    found = {name: sha256_of(models / file) for name, file in WEIGHTS.items() if (models / file).is_file()}
    if arguments.keep is not None:
        shutil.copytree(models, arguments.keep)
    return _compare(recorded, sums, found, worktree.folder / paths.TRAIN_REPORT)


def write_params(path: Path, recorded: Recorded) -> None:
    """Writes params.yaml: with the params of the run, and with what was measured or chosen by its machine.

    Keys that the commit does not know are left out. Checkpoints go to the checkout, so training starts from scratch.
    """
    editor = YAML()
    content = editor.load(path.read_text(encoding="utf-8"))
    for section, values in recorded.params.items():
        content.setdefault(section, {}).update(values)
    then = recorded.environment
    chosen: dict[str, Any] = {"checkpoint_folder": "checkpoints"}
    if then.get("precision") in PRECISIONS:
        chosen["precision"] = PRECISIONS[then["precision"]]
    if "compiled" in then:
        chosen["compile"] = "always" if then["compiled"] else "never"
    for key in ("device", "processes", "gradient_checkpointing"):
        if key in then:
            chosen[key] = then[key]
    if then.get("strategy"):
        chosen["strategy"] = then["strategy"]
    if then.get("device") == "cpu" and then.get("processes") == 1:
        # the same number either way, but with null this run waits for its turn
        chosen["threads"] = None if then["threads"] == available() else then["threads"]
    content["runtime"].update({key: value for key, value in chosen.items() if key in content["runtime"]})
    with path.open("w", encoding="utf-8") as file:
        editor.dump(content, file)


def _explain(recorded: Recorded) -> None:
    """Says what is known beforehand of differences."""
    if len(recorded.sessions) > 1:
        echo("this run was interrupted, and went on elsewhere; the last of its environments is compared")
    found = differences(recorded.environment, machine())
    if found:
        echo(f"here, other bits are likely: {'; '.join(found)}")


def _sums_of_outputs(worktree: Worktree) -> dict[str, str]:
    """The sums of the weights that DVC has of a run, whose reports do not name them."""
    folder = worktree.folder / paths.MODELS
    if not worktree.get(folder.name) and not (worktree.remotes and worktree.pull(folder.name)):
        return {}
    sums = {name: sha256_of(folder / file) for name, file in WEIGHTS.items() if (folder / file).is_file()}
    shutil.rmtree(folder)
    return sums


def _check_code(recorded: Recorded, worktree: Worktree, has_tokens: bool = True) -> None:
    """Raises UserError if the commit's dvc.lock says that the results were made by something else than is in it."""
    changed = worktree.changed("train") if recorded.has_lock else []
    if not has_tokens:
        changed = [name for name in changed if name != paths.TOKENS.as_posix()]
    if changed:
        raise UserError(
            f"cannot reproduce {recorded.run.name}: its results were made by other files than commit "
            f"{recorded.commit[:7]} has ({', '.join(changed)}); run `dvc repro` there, and commit the results"
        )


def _get_tokens(worktree: Worktree, sums: dict[str, str]) -> None:
    """Pulls the tokens, or makes them from the text. Raises UserError if that is gone, or not the run's."""
    if worktree.remotes and worktree.pull(paths.TOKENS.as_posix()):
        echo(f"pulled the tokens from {' or '.join(worktree.remotes)}")
        return
    expected = sums.get("corpus")
    echo("making the tokens from the text; neither DVC's cache nor a remote has them")
    of_run = f"the run's has SHA-256 {expected}" if expected else "the sum of the run's is not known"
    if code := worktree.run_stage("fetch", sees_root=True):
        raise UserError(f"the text of the run is gone, and {of_run}: its fetch stage ended with exit code {code}")
    found = json.loads((worktree.folder / paths.CORPUS_FACTS).read_text(encoding="utf-8"))["sha256"]
    if expected not in (None, found):
        raise UserError(f"the text has changed: its SHA-256 is {found}, and {of_run}; restore that text")
    if code := worktree.run_stage("tokenize"):
        raise UserError(f"cannot tokenize the text of the run: its tokenize stage ended with exit code {code}")


def _check_tokens(worktree: Worktree, sums: dict[str, str]) -> None:
    """Raises UserError if the tokens are not those of the run."""
    index = read_index(worktree.folder / paths.TOKENS)
    for split in ("train", "val"):
        found, expected = split_sha256(index, split), sums.get(f"{split}_tokens")
        if expected not in (None, found):
            raise UserError(f"the {split} tokens have the sum {found}, and those of the run had {expected}")


def _turn(recorded: Recorded, worktree: Worktree) -> Any:
    """Waits for the cores, as a stage of the user's own tree does."""
    with suppress(UserError):  # the params of an earlier version
        runtime = load_params(worktree.folder / paths.PARAMS).runtime
        device = recorded.environment.get("device", runtime.device)
        return reserve_cores(replace(runtime, device=device), worktree.stop)
    return nullcontext()


def _compare(recorded: Recorded, sums: dict[str, str], found: dict[str, str], reports: Path) -> int:
    """Prints the verdict. Returns the exit code."""
    name = recorded.run.name
    wrong = [key for key in found if sums.get(key, found[key]) != found[key]]
    if not wrong:
        print(f"same bits: the weights of {name} have SHA-256 {found['model']} again")
        return SAME
    print(f"different bits: {WEIGHTS[wrong[0]]} has SHA-256 {found[wrong[0]]}, that of {name} {sums[wrong[0]]}")
    print(
        first_difference(recorded.run.files.read("reports/train/history.csv"), (reports / "history.csv").read_bytes())
    )
    try:
        here = read_sessions((reports / ENVIRONMENT_FILE).read_bytes())[-1]
    except (OSError, ValueError):
        here = machine()
    changes = differences(recorded.environment, here)
    if changes:
        print(f"why: {'; '.join(changes)}")
    elif recorded.environment.get("versions"):
        print(
            "why: not known; versions, processor and threads are those of the run. Some kernels of GPUs are not exact"
        )
    else:
        print(f"why: not known; the run has no {paths.TRAIN_REPORT / ENVIRONMENT_FILE}")
    return DIFFERENT


def first_difference(then: bytes | None, now: bytes) -> str:
    """The first number that differs between two histories (CSV), in a sentence."""
    if then is None:
        return "the run has no history to compare with"
    rows = [{row["step"]: row for row in csv.DictReader(io.StringIO(text.decode()))} for text in (then, now)]
    steps = [step for step in rows[0] if step in rows[1]]
    for step in steps:
        for column in NUMBERS:
            before, after = (each[step].get(column) for each in rows)
            if before != after:
                return f"the first difference: step {step}, {column} {after} instead of {before}"
    return f"the histories are equal at all {len(steps)} logged steps, to six digits; the weights differ after these"
