"""Training in several processes, beside training in one."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from gpt2.config import TrainConfig
from gpt2.errors import FileError, UserError
from gpt2.training.checkpoints import CheckpointStore
from tests.conftest import ROOT, our_text, tokenize, write_documents
from tests.gpt2.distributed import ranks

STEPS = 15


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write_documents(folder, [our_text(4, seed) for seed in range(100)])
    tokenize(folder, 0.2)
    return folder / "tokens"


@pytest.fixture(scope="module")
def together(tmp_path_factory, tokens):
    """Runs a scenario of `ranks` in several processes; returns its outcome."""

    def run(processes, scenario, folder=None, steps=STEPS):
        (found,) = in_turn([(processes, scenario, folder, steps)])
        return found

    def in_turn(scenarios):
        place = tmp_path_factory.mktemp("ranks")
        outcomes = [place / f"{number}.json" for number in range(len(scenarios))]
        groups = [
            [processes, scenario, str(outcome), str(tokens), str(folder or place), steps]
            for outcome, (processes, scenario, folder, steps) in zip(outcomes, scenarios, strict=True)
        ]
        command = [sys.executable, "-m", "tests.gpt2.distributed.ranks", json.dumps(groups)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(outcome.read_text()) for outcome in outcomes]

    run.in_turn = in_turn
    return run


@pytest.fixture(scope="module")
def alone(tokens):
    """The losses of one process, by optimizer."""

    def losses(optimizer, steps=STEPS):
        return ranks.Run(tokens, ranks.recipe(optimizer=optimizer, max_steps=steps)).go()

    return losses


def assert_same_curve(found, expected, tolerance=1e-3):
    assert len(found) == len(expected)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found == pytest.approx(expected, rel=tolerance)


def test_two_processes_have_the_losses_of_one(together, alone):
    for name, losses in together(2, "curves").items():
        assert_same_curve(losses, alone(name.split()[1]))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_have_the_losses_of_one_for_a_hundred_steps(together, alone, processes):
    for name, losses in together(processes, "curves", steps=100).items():
        assert_same_curve(losses, alone(name.split()[1], 100))


@pytest.fixture(scope="module")
def of_four(together):
    return together(4, "parts")


def test_processes_agree(of_four):
    assert of_four["sum"] == 10.0
    assert of_four["any"]
    assert not of_four["none"]
    assert of_four["gather"] == [0, 1, 2, 3]
    assert of_four["max"] == 3
    assert of_four["first"] == 0


def test_validation_is_the_mean_over_all_tokens(of_four, tokens):
    expected = ranks.Run(tokens, ranks.recipe()).validate(3, lambda _: None)
    for strategy in ("ddp", "fsdp"):
        assert of_four[f"{strategy} val"] == pytest.approx(expected, rel=1e-6)
        # 12 windows of 16 in 4 batches, and the last 12 tokens: two turns of four processes
        assert of_four[f"{strategy} progress"] == [2, 204]


def test_weights_are_not_left_in_the_compute_dtype_after_validation(of_four):
    assert of_four["fsdp dtypes"] == of_four["ddp dtypes"] == ["torch.float32"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_mixed_precision_checkpointing_smoothing_and_masks_work_in_several_processes(of_four, tokens, strategy):
    config = ranks.recipe(max_steps=6, optimizer="muon", label_smoothing=0.1, mask_documents=True)
    expected = ranks.Run(tokens, config, precision=torch.bfloat16).go()
    unmasked = ranks.Run(tokens, replace(config, mask_documents=False), precision=torch.bfloat16).go()
    assert expected != pytest.approx(unmasked, rel=1e-5)
    assert of_four[f"{strategy} bf16"] == pytest.approx(expected, rel=3e-3)
    assert of_four[f"{strategy} bf16 checkpointing"] == pytest.approx(of_four[f"{strategy} bf16"], rel=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_rare_tokens_share_a_row_in_several_processes(of_four, tokens, strategy):
    config = ranks.recipe(max_steps=6, optimizer="muon", min_token_count=2)
    assert of_four[f"{strategy} tied"] == pytest.approx(ranks.Run(tokens, config).go(), rel=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_frozen_blocks_work_in_several_processes(of_four, tokens, strategy):
    config = ranks.recipe(max_steps=6, optimizer="muon", init_from="elsewhere", freeze_layers=1)
    expected = ranks.Run(tokens, config, precision=torch.bfloat16).go()
    assert of_four[f"{strategy} frozen"] == pytest.approx(expected, rel=3e-3)


def test_each_of_four_processes_holds_its_part_of_a_sharded_model(of_four):
    assert 0.25 <= of_four["fsdp share"] <= 0.30


def test_nan_in_one_process_stops_all_at_the_same_step(of_four):
    assert of_four["non-finite"] == [3, 3, 3, 3]


def test_processes_stop_early_together(of_four):
    assert of_four["early stop"] == [8, 8, 8, 8]


def test_processes_without_memory_ask_for_half_the_micro_batch(of_four):
    assert of_four["out of memory"] == 1  # 8 sequences for 4 processes are 2 each


def test_a_run_in_two_processes_resumes_to_the_same_bits(together):
    for found in together(2, "resumption").values():
        assert found["step"] == 5
        assert found["same"]
        assert found["same best"]
        assert found["history"]
        assert found["best"][0] == found["best"][1]
        assert found["files"] == [
            "gpt_model_checkpoint.pt",
            "manifest.json",
            "shard-00001-model-00001-of-00001.safetensors",
            "shard-00002-model-00001-of-00001.safetensors",
        ]
        assert found["left"] == ["step-000005", "step-000008"]


def change_shape(together, tokens, folder, shapes):
    """Goes on with each number of processes and strategy, and compares with one process at the end."""
    *_, losses = together.in_turn([(processes, "transition", folder, strategy) for processes, strategy in shapes])
    undisturbed = ranks.Run(tokens, ranks.recipe(optimizer="muon", max_steps=100))
    undisturbed.go(ranks.Recorder(stop_after=len(losses)))
    assert len(losses) == 5 * len(shapes)
    assert_same_curve(losses, [row["train_loss"] for row in undisturbed.state.history])


def test_checkpoints_fit_other_numbers_of_processes_and_the_other_strategy(together, tokens, tmp_path):
    change_shape(together, tokens, tmp_path / "run", [(1, "ddp"), (2, "fsdp"), (1, "ddp")])


@pytest.mark.slow
def test_checkpoints_survive_twelve_changes(together, tokens, tmp_path):
    shapes = [(1, "ddp"), (4, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "fsdp"), (1, "ddp"), (4, "fsdp"), (2, "fsdp")]
    shapes += [(4, "ddp"), (4, "fsdp"), (2, "ddp"), (4, "ddp")]
    change_shape(together, tokens, tmp_path / "run", [*shapes, (1, "ddp")][:12])


def test_a_damaged_shard_is_found(together, tokens, tmp_path):
    folder = tmp_path / "run"
    together(2, "transition", folder, "fsdp")
    store = CheckpointStore(folder)
    (step,) = store.steps()
    shard = store.path(step) / "shard-00002-model-00001-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(FileError, match=r"shard-00002.* is damaged"):
        store.load(step)
    assert not store.is_valid(step)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "expected"),
    [
        (8, 1, 1, (8, 1)),
        (8, 1, 4, (2, 1)),
        (32, 2, 2, (32, 1)),
        (32, 3, 2, (24, 2)),
        (4, 8, 4, (4, 2)),
        (6, 1, 6, (1, 1)),
    ],
)
def test_the_global_batch_is_divided(train_config, batch_size, accumulation, processes, expected):
    config = train_config(batch_size=batch_size, gradient_accumulation_steps=accumulation)
    share: TrainConfig = config.share(processes)
    assert (share.batch_size, share.gradient_accumulation_steps) == expected
    assert share.tokens_per_step * processes == config.tokens_per_step


def test_a_batch_that_cannot_be_divided_is_one_line(train_config):
    with pytest.raises(UserError, match=r"8 sequences, which 3 processes cannot divide; possible: 1, 2, 4, 8$"):
        train_config(batch_size=4, gradient_accumulation_steps=2).share(3)
