import copy

import pytest
import torch

from gpt2.errors import OutOfMemoryError
from gpt2.training.state import checkpoint_content, restore_checkpoint
from tests.gpt2.training.small_run import Recorder, Run


def test_accumulation_equals_one_large_batch(tokens, train_config):
    runs = [
        Run(
            tokens,
            train_config(
                batch_size=8 // k, gradient_accumulation_steps=k, max_steps=3, warmup_steps=1, learning_rate=1e-3
            ),
        )
        for k in (1, 2, 8)
    ]
    callbacks = [Recorder() for _ in runs]
    for run, recorder in zip(runs, callbacks, strict=True):
        run.go(recorder)
    for run, recorder in zip(runs[1:], callbacks[1:], strict=True):
        for key in ("train_loss", "grad_norm"):
            expected = [row[key] for row in callbacks[0].rows]
            assert [row[key] for row in recorder.rows] == pytest.approx(expected, rel=1e-4)
        # Adam divides by the gradient's size, which makes rounding visible where it is near 0
        assert (run.weights() - runs[0].weights()).abs().mean() < 1e-6


def out_of_memory_above(run, sequences):
    """Simulates memory for micro-batches of at most this number of sequences. Returns the sizes of all tries."""
    original, sizes = run.compute.loss, []

    def loss(inputs, targets, **options):
        sizes.append(len(inputs))
        if len(inputs) > sequences and torch.is_grad_enabled():
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return original(inputs, targets, **options)

    run.compute.loss = loss
    return sizes


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(tokens, train_config):
    whole, short = Run(tokens, train_config(batch_size=8)), Run(tokens, train_config(batch_size=8))
    expected, callbacks = Recorder(), Recorder()
    whole.go(expected)
    sizes = out_of_memory_above(short, 2)
    assert short.go(callbacks)
    assert sizes[:3] == [8, 4, 2]
    assert short.state.micro_batch_size == 2
    assert len(callbacks.warnings) == 2
    assert (
        "with a micro-batch of 8: continuing with a micro-batch of 4 and 2 times the gradient accumulation"
        in callbacks.warnings[0]
    )
    for key in ("train_loss", "grad_norm", "tokens"):
        assert [row[key] for row in callbacks.rows] == pytest.approx([row[key] for row in expected.rows], rel=1e-4)


def test_a_run_with_a_halved_micro_batch_resumes_exactly(tokens, train_config):
    config = train_config(batch_size=8)
    whole, parts, resumed = (Run(tokens, config) for _ in range(3))
    for run in (whole, parts):
        out_of_memory_above(run, 4)
    whole.go(Recorder())
    parts.go(Recorder(stop_after=3))
    content = copy.deepcopy(checkpoint_content(parts.model, parts.optimizer, parts.state))
    resumed.state = restore_checkpoint(content, resumed.model, resumed.optimizer)
    sizes = out_of_memory_above(resumed, 4)
    assert resumed.go(Recorder())
    assert max(sizes) == 4
    assert torch.equal(resumed.weights(), whole.weights())


def test_out_of_memory_with_one_sequence_is_an_error_with_advice(tokens, train_config):
    run = Run(tokens, train_config())
    out_of_memory_above(run, 0)
    with pytest.raises(OutOfMemoryError, match=r"one sequence of 16 tokens.*gradient_checkpointing: true") as raised:
        run.go(Recorder())
    assert raised.value.exit_code == 74


def test_other_errors_are_not_treated_as_out_of_memory(tokens, train_config):
    run = Run(tokens, train_config())

    def fail(*_, **__):
        raise RuntimeError("shapes do not match")

    run.compute.loss = fail
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run.go(Recorder())
