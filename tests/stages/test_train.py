from dataclasses import replace

import numpy as np
import pytest
import torch

from gpt2.data.token_files import open_tokens
from gpt2.errors import DivergedError, UserError
from gpt2.hub.export import save_pretrained
from gpt2.training import vocabulary
from gpt2.training.checkpoints import CheckpointStore
from gpt2.training.mixed_precision import CompileError, MixedPrecisionModel
from gpt2.training.state import TrainState, environment
from gpt2.world import ALONE
from stages import paths, session, train
from stages.callbacks import StageCallbacks
from stages.params import load_params
from stages.preflight import Plan
from tests.conftest import ROOT, TINY, TINY_TRAIN, our_text, tokenize, write_documents


@pytest.fixture
def params():
    params = load_params(ROOT / "params.yaml")
    return replace(params, model=TINY, train=TINY_TRAIN)


def starting_from(params, source):
    return replace(params, train=replace(params.train, init_from=source))


def test_training_starts_from_hugging_face_weights(params, tiny_model, tmp_path):
    save_pretrained(tiny_model, tmp_path)
    model = session.initial_model(starting_from(params, str(tmp_path)), TINY)
    idx = torch.arange(10)[None]
    assert torch.equal(model(idx)[0], tiny_model(idx)[0])
    assert not torch.equal(session.initial_model(params, TINY)(idx)[0], tiny_model(idx)[0])


def test_weights_of_other_sizes_are_refused_with_the_right_ones(params, tiny_model, tmp_path):
    save_pretrained(tiny_model, tmp_path)
    other = replace(params, model=replace(TINY, n_layer=3, block_size=64))
    with pytest.raises(UserError, match="has other sizes; set in the section model: block_size: 32, n_layer: 2"):
        session.initial_model(starting_from(other, str(tmp_path)), other.model)


@pytest.mark.parametrize("mask_documents", [False, True])
def test_documents_are_masked_if_the_params_say_so(params, tmp_path, monkeypatch, never_stops, mask_documents):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "configure_device", lambda *_: None)  # it changes the allocator of this process
    write_documents(paths.CORPUS.parent, [our_text(20, seed) for seed in range(10)])
    tokenize(paths.CORPUS.parent)
    chosen = replace(params, train=replace(params.train, mask_documents=mask_documents))
    run = session.set_up(Plan(chosen, {}, tmp_path / "checkpoints/a", 2, {}), never_stops, ALONE)
    assert run.model.compute.mask_documents == mask_documents


def test_tokens_that_the_text_lacks_share_a_row_until_the_model_is_written(params, tmp_path, monkeypatch, never_stops):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "configure_device", lambda *_: None)  # it changes the allocator of this process
    write_documents(paths.CORPUS.parent, [our_text(20, seed) for seed in range(10)])
    tokenize(paths.CORPUS.parent)
    config = replace(params.train, min_token_count=1)

    def rows(**changes):
        chosen = replace(params, train=replace(config, **changes))
        run = session.set_up(Plan(chosen, {}, tmp_path / "checkpoints/a", 2, {}), never_stops, ALONE)
        return run.model.config.vocab_size

    num_tokens = len(np.unique(open_tokens(paths.TOKENS, "train")[:]))
    assert rows() == num_tokens + 1
    assert rows(min_token_count=0) == TINY.vocab_size
    assert 1 < rows(min_token_count=2) < rows()
    with pytest.raises(UserError, match=r"no token is 100000 times in the text; lower train\.min_token_count"):
        rows(min_token_count=100_000)
    monkeypatch.setattr(vocabulary, "MAX_COUNTED_TOKENS", 10)
    assert rows() == TINY.vocab_size


def test_the_fingerprint_changes_with_each_input(tmp_path):
    source = tmp_path / "a.py"
    source.write_text("x = 1")
    before = train.fingerprint({"lr": 1, "n": 2}, [source])
    assert train.fingerprint({"n": 2, "lr": 1}, [source]) == before
    assert train.fingerprint({"lr": 1.5, "n": 2}, [source]) != before
    source.write_text("x = 2")
    assert train.fingerprint({"lr": 1, "n": 2}, [source]) != before


def test_the_fingerprint_covers_the_code_that_decides_the_numbers(monkeypatch):
    monkeypatch.chdir(ROOT)
    sources = {path.as_posix() for path in train.training_sources()}
    assert sources >= {
        "gpt2/data/sampler.py",
        "gpt2/model/transformer.py",
        "gpt2/optimizers/optimizer.py",
        "gpt2/training/trainer.py",
    }
    assert not [source for source in sources if source.startswith(("gpt2/inference", "gpt2/evaluation"))]


@pytest.mark.parametrize(("peak_flops", "compiled"), [(1.0, True), (1e30, False)])
def test_long_runs_are_compiled(params, peak_flops, compiled):
    assert session.is_compiled(params, TINY, "cpu", peak_flops) == compiled
    assert not session.is_compiled(params, TINY, "mps", peak_flops)
    for setting, expected in (("always", True), ("never", False)):
        chosen = replace(params, runtime=replace(params.runtime, compile=setting))
        assert session.is_compiled(chosen, TINY, "cpu", peak_flops) == expected


def test_a_run_that_diverged_twice_at_one_step_is_refused(tmp_path):
    def diverge(good_steps):
        with pytest.raises(DivergedError) as raised, train.limit_repeated_divergence(tmp_path):
            raise DivergedError(f"diverged after {good_steps}", good_steps)
        return str(raised.value)

    for good_steps in (7, 9, 9):
        assert diverge(good_steps) == f"diverged after {good_steps}"
    message = diverge(11)  # not even tried
    assert message.startswith("diverged after 9. This happened 2 times at the same step: change a parameter, or delete")
    (tmp_path / train.DIVERGED_FILE).write_text("{")
    assert diverge(9) == "diverged after 9"


def test_resuming_in_another_environment_is_one_warning(tiny_model, capsys):
    now = environment(tiny_model)
    session.warn_if_not_bitwise_reproducible(now, now)
    assert capsys.readouterr().err == ""
    session.warn_if_not_bitwise_reproducible({**now, "threads": 77, "torch": "1.0"}, now)
    error = capsys.readouterr().err
    assert error.startswith(f"WARNING: this run started with torch 1.0 instead of {torch.__version__}, threads 77")
    assert error.count("\n") == 1


def test_training_continues_without_a_compiler(tiny_model, monkeypatch, capsys):
    def fail(*_):
        raise CompileError("no working C++ compiler")

    monkeypatch.setattr(MixedPrecisionModel, "compile", fail)
    state = TrainState.initial(torch.float32, 2)
    assert not session.compile_model(MixedPrecisionModel(tiny_model, torch.float32), state, 16)
    assert "training continues without it, slower: no working C++ compiler" in capsys.readouterr().err


def test_early_stopping_is_one_line(tmp_path, never_stops, capsys):
    state = TrainState.initial(torch.float32, 2)
    state.step, state.best_step = 300, 200
    callbacks = StageCallbacks(CheckpointStore(tmp_path), None, never_stops, state, 500)
    callbacks.stopped_early(state)
    callbacks.close()
    printed = capsys.readouterr().err
    assert printed == (
        "stopped early, after step 300 of 500: the validation loss has not improved since step 200 (train.patience)\n"
    )
