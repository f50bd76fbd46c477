import json
import subprocess

import pytest
import torch

from benchmarks import steps, train
from gpt2.config import GPT2_VOCAB_SIZE
from tests.conftest import TINY

CPU = torch.device("cpu")


@pytest.mark.parametrize("contender", [*train.OURS.values(), *train.PEERS.values()], ids=[*train.OURS, *train.PEERS])
def test_each_contender_runs_a_step(contender):
    batches = [tuple(torch.randint(0, TINY.vocab_size, (2, 16)) for _ in range(2))]
    step = steps.make_step({**contender, "compile": False}, TINY, torch.float32, CPU, batches)
    step()
    step()


def test_the_tokens_of_a_text_share_a_row_if_they_are_rare(tokens, monkeypatch):
    monkeypatch.setattr(steps.paths, "TOKENS", tokens)
    batches, vocabulary = steps.text_batches(2, 16, 2, CPU)
    (first, first_targets), (second, _) = batches
    assert first.shape == second.shape == (2, 16)
    assert torch.equal(first.flatten()[1:], first_targets.flatten()[:-1])
    assert not torch.equal(first, second)
    assert len(vocabulary.tokens) + vocabulary.shared == GPT2_VOCAB_SIZE
    steps.make_step({"compile": False}, TINY, torch.float32, CPU, batches, vocabulary=vocabulary)()


def test_a_part_of_the_contenders_makes_a_report_and_the_others_keep_their_numbers(monkeypatch, tmp_path):
    start = subprocess.run

    def worker(command, **options):
        if "--worker" not in command:  # matplotlib looks for fonts
            return start(command, **options)
        contender = json.loads(command[-1])
        speed = 500 if contender.get("bound") else 200 if "peer" in contender else 300
        sizes = {"tokens_per_s": speed, "peak_flops": 1e12, "mfu": 0.5, "peak_gb": 1.0, "set_up_s": 1.0}
        row = {**sizes, "machine": "a CPU", "reduced": "bf16"}
        return subprocess.CompletedProcess(command, 0, json.dumps(row))

    def run(only):
        monkeypatch.setattr("sys.argv", ["train", "--device", "cpu", "--case", "laptop", "--only", only])
        train.main()
        return [line for line in (tmp_path / "train.md").read_text().splitlines() if "300" in line]

    monkeypatch.setattr(train, "REPORT", tmp_path)
    monkeypatch.setattr(train.subprocess, "run", worker)
    assert run("ours, {reduced}") == ["| ours, bf16 | 300 |  |  | 50% |  | 1.00 | 1.0 |"]
    run("our allocator settings")
    assert run("products") == ["| ours, bf16 | 300 | 1.50 | 60% | 50% |  | 1.00 | 1.0 |"]
    assert (tmp_path / "train.png").stat().st_size > 0
