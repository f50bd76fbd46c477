"""Those that run lm-evaluation-harness are skipped where it is not installed."""

import math
import sys
from dataclasses import asdict

import numpy as np
import pytest

from gpt2 import tokenizer
from gpt2.errors import UserError
from gpt2.evaluation.choices import accuracy, score_endings
from gpt2.evaluation.cloze import cloze_questions
from gpt2.hub import harness
from gpt2.hub.harness import flat_results, load_tasks, question_task, run_tasks


@pytest.fixture
def lm_eval(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("lm_eval")


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"evaluate\.tasks needs lm-evaluation-harness: pip install 'lm_eval"):
        load_tasks(["hellaswag"])


def test_results_become_flat_numbers():
    results = {
        "hellaswag": {
            "alias": "hellaswag",
            "acc_norm,none": 0.29,
            "acc_norm_stderr,none": 0.004,
            "sample_len": 10,
            "f1,none": math.nan,
        },
        "gsm8k": {"exact_match,strict-match": 0.0, "exact_match_stderr,strict-match": "N/A"},
    }
    assert flat_results(results) == {
        "hellaswag/acc_norm": 0.29,
        "hellaswag/acc_norm_stderr": 0.004,
        "gsm8k/strict-match/exact_match": 0.0,
    }


def test_our_scores_are_those_of_the_harness(lm_eval, tiny_model, text, tmp_path):
    from lm_eval.tasks import TaskManager

    for parameter in tiny_model.parameters():
        parameter.data *= 20  # endings differ clearly
    questions = cloze_questions(np.array(tokenizer.encode(text), dtype=np.uint16), 1)[:60]
    ours = accuracy(questions, score_endings(tiny_model, questions, context_length=24, batch_size=8))
    tasks = TaskManager(include_defaults=False).load([question_task("cloze", questions, tmp_path / "cloze.jsonl")])
    theirs = run_tasks(tasks, tiny_model, context_length=24, batch_size=8)
    assert theirs == pytest.approx(
        {f"cloze/{key}": value for key, value in asdict(ours).items() if key != "questions"}, abs=1e-6
    )
    assert 0 < ours.acc < 1


@pytest.mark.slow  # reads the configurations of thousands of tasks
def test_unknown_names_and_missing_data_are_errors(lm_eval, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="lm-evaluation-harness has no task 'helaswag'; did you mean 'hellaswag'"):
        load_tasks(["helaswag"])
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    with pytest.raises(UserError, match="the data of the task 'piqa' is not in the cache of Hugging Face") as error:
        load_tasks(["piqa"])
    assert "\n" not in str(error.value)


def test_an_error_of_a_data_set_becomes_one_line(monkeypatch):
    class Manager:
        all_tasks = ("piqa",)

        def load(self, names):
            raise ConnectionError("no\nnetwork")

    fake = type(sys)("lm_eval.tasks")
    fake.TaskManager = Manager
    monkeypatch.setitem(sys.modules, "lm_eval", type(sys)("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", fake)
    with pytest.raises(UserError, match=r"cannot be downloaded; run once .* \(no network\)$"):
        load_tasks(["piqa"])
    with pytest.raises(UserError, match=r"no task 'piqua'; did you mean 'piqa'\?$"):
        load_tasks(["piqua"])
    assert "lm_eval" in harness.REQUIREMENT
