import json

import pytest

from benchmarks.train import CASES
from gpt2 import memory
from gpt2.config import GPT2_VOCAB_SIZE, PRESETS, GPTConfig
from gpt2.memory import GIB, largest_batch, training_bytes
from gpt2.training import loss
from tests.conftest import ROOT, TINY

MEASURED = json.loads((ROOT / "reports/benchmarks/train.json").read_text())


@pytest.mark.parametrize("case", [case for case in CASES if case in MEASURED])
@pytest.mark.parametrize(
    ("contender", "options"),
    [
        ("ours, bf16", {"reduced_precision": True}),
        ("ours, bf16, gradient checkpointing", {"reduced_precision": True, "gradient_checkpointing": True}),
        ("ours, fp32", {"reduced_precision": False}),
    ],
)
def test_the_estimate_is_close_to_the_measured_peaks(case, contender, options):
    sizes, batch_size, length, _ = CASES[case]
    measured = next(row["peak_gb"] for row in MEASURED[case]["rows"] if row["contender"] == contender)
    config = GPTConfig(vocab_size=GPT2_VOCAB_SIZE, **sizes)
    assert training_bytes(config, batch_size, length, **options) / 1e9 == pytest.approx(measured, rel=0.2)


def test_the_measurements_cover_three_configurations():
    assert len(MEASURED) >= 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_largest_batch_is_the_largest(checkpointing):
    config = PRESETS["gpt2"]
    for size in (2 * GIB, 14 * GIB, 80 * GIB):
        n = largest_batch(config, size, gradient_checkpointing=checkpointing, on_cpu=False)
        options = {"reduced_precision": True, "gradient_checkpointing": checkpointing, "on_cpu": False}
        assert n == 0 or training_bytes(config, n, 1024, **options) <= size
        assert training_bytes(config, n + 1, 1024, **options) > size


def test_gradient_checkpointing_takes_less_memory():
    for config in (TINY, *PRESETS.values()):
        plain, less = (
            training_bytes(config, 8, 32, reduced_precision=True, gradient_checkpointing=c) for c in (False, True)
        )
        assert less < plain


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_frozen_block_takes_less_memory(checkpointing):
    options = {"reduced_precision": True, "gradient_checkpointing": checkpointing}
    needed = [training_bytes(PRESETS["gpt2"], 8, 128, freeze_layers=n, **options) for n in range(12)]
    assert needed == sorted(needed, reverse=True)
    assert needed[11] < 0.6 * needed[0]


def test_the_chunk_size_matches_the_loss():
    assert memory.CHUNK_TOKENS == loss.CHUNK_TOKENS
