import math

import pytest
import torch

from gpt2.inference.kv_cache import ModelRunner, window_start


@torch.inference_mode()
def test_prefill_and_decode_compute_the_logits_of_the_whole_sequence(tiny_model):
    sequences = {0: [1, 2, 3, 4, 5], 2: [9, 8]}
    runner = ModelRunner(tiny_model.eval(), slots=3, context_length=16)
    runner.prefill(2, [7] * 16)  # the next prefill must replace this content
    for slot, ids in sequences.items():
        runner.prefill(slot, ids[:1])
        logits = runner.logits(runner.prefill(slot, ids[1:], cached=1))
        assert torch.allclose(logits, tiny_model(torch.tensor([ids]))[0][0, -1], atol=1e-5)
    for token in (11, 12, 13):
        rows = runner.decode([2, 0], [token, token + 1])
        sequences[2].append(token)
        sequences[0].append(token + 1)
        for slot, row in zip((2, 0), rows, strict=True):
            assert torch.allclose(row, tiny_model(torch.tensor([sequences[slot]]))[0][0, -1], atol=1e-5)


@pytest.mark.parametrize("context", [1, 2, 7, 24])
def test_the_window_never_exceeds_the_context_and_moves_rarely(context):
    starts = [window_start(length, context) for length in range(1, 200)]
    seen = [length - start for length, start in zip(range(1, 200), starts, strict=True)]
    assert all(1 <= s <= context for s in seen)
    assert starts == sorted(starts)
    assert len(set(starts)) <= 1 + math.ceil(200 / max(1, context // 2))
