"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), on the exported model.

The model is written as the export does, and loaded with `transformers`: what is scored is what others load.
"""

import difflib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from gpt2.errors import UserError, one_line
from gpt2.evaluation.choices import Question
from gpt2.files import write_text
from gpt2.hub.export import save_pretrained
from gpt2.model.transformer import GPT

REQUIREMENT = "lm_eval[hf]>=0.4.13,<0.5"
BOOTSTRAP_RESAMPLES = 1000
"""For the standard errors of metrics that have no formula, such as LAMBADA's perplexity."""


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """The tasks of these names or groups, with their data, downloaded or from the cache.

    Raises UserError if the package lm_eval is missing, if there is no such task, or if its data cannot be had.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(f"evaluate.tasks needs lm-evaluation-harness: pip install '{REQUIREMENT}'") from None
    manager = TaskManager()
    tasks: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, ["cloze", *manager.all_tasks], n=3)
            meant = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise UserError(f"evaluate.tasks: lm-evaluation-harness has no task {name!r}{meant}")
        try:
            for kind, found in manager.load([name]).items():
                tasks[kind] |= found
        except Exception as error:  # datasets and huggingface_hub raise many types
            raise UserError(
                f"the data of the task {name!r} is not in the cache of Hugging Face and cannot be downloaded; run once "
                f"with a network and without HF_HUB_OFFLINE, or remove it from evaluate.tasks ({one_line(error)})"
            ) from None
    return tasks


def run_tasks(tasks: dict[str, Any], model: GPT, *, context_length: int, batch_size: int) -> dict[str, float]:
    """The results on tasks of `load_tasks`, `<name>/<metric>` and `<name>/<metric>_stderr`.

    context_length: longer questions lose their beginning.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder))
        theirs: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    harness = HFLM(
        pretrained=theirs.to(model.device), tokenizer=tokenizer, max_length=context_length, batch_size=batch_size
    )
    found = evaluate(harness, tasks, bootstrap_iters=BOOTSTRAP_RESAMPLES, log_samples=False)
    return flat_results(found["results"])


def flat_results(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The numbers of lm-evaluation-harness's results, {task: {"acc,none": ..., "acc_stderr,none": ...}}, by flat names.

    Leaves out what is not a finite number. A filter other than "none" becomes part of the name.
    """
    flat = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if filtered and isinstance(value, int | float) and math.isfinite(value):
                flat[f"{task}/{metric}" if filtered == "none" else f"{task}/{filtered}/{metric}"] = float(value)
    return flat


def question_task(name: str, questions: Sequence[Question], path: Path) -> dict[str, Any]:
    """Writes questions as JSON lines. Returns their task for lm-evaluation-harness: the content of its YAML file."""
    rows = [{"context": each.context, "endings": each.endings, "answer": each.answer} for each in questions]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "endings",
        "doc_to_target": "answer",
        "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
    }
