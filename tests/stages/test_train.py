from dataclasses import replace

import pytest
import torch

from gpt2 import trainer
from gpt2.compute import CompileError, Compute
from gpt2.data import Sampler, open_tokens
from gpt2.errors import DivergedError, UserError
from gpt2.exchange import write_hugging_face
from gpt2.trainer import TrainState
from stages import train
from stages.params import load_params
from tests.conftest import ROOT, TINY, TINY_TRAIN


@pytest.fixture
def params():
    params = load_params(ROOT / "params.yaml")
    return replace(params, model=TINY, train=TINY_TRAIN)


def starting_from(params, source):
    return replace(params, train=replace(params.train, init_from=source))


def test_training_starts_from_hugging_face_weights(params, tiny_model, tmp_path):
    write_hugging_face(tiny_model, tmp_path)
    model = train.initial_model(starting_from(params, str(tmp_path)))
    idx = torch.arange(10)[None]
    assert torch.equal(model(idx)[0], tiny_model(idx)[0])
    assert not torch.equal(train.initial_model(params)(idx)[0], tiny_model(idx)[0])


def test_weights_of_other_sizes_are_refused_with_the_right_ones(params, tiny_model, tmp_path):
    write_hugging_face(tiny_model, tmp_path)
    other = replace(params, model=replace(TINY, n_layer=3, block_size=64))
    with pytest.raises(UserError, match="has other sizes; set in the section model: block_size: 32, n_layer: 2"):
        train.initial_model(starting_from(other, str(tmp_path)))


def test_the_code_that_decides_the_numbers_is_in_the_fingerprint(monkeypatch):
    monkeypatch.chdir(ROOT)
    sources = {path.as_posix() for path in train.training_sources()}
    assert {"gpt2/model.py", "gpt2/trainer.py", "gpt2/data.py", "gpt2/optim.py"} <= sources
    assert "gpt2/generation.py" not in sources


@pytest.mark.parametrize(("peak_flops", "compiled"), [(1.0, True), (1e30, False)])
def test_long_runs_are_compiled(params, peak_flops, compiled):
    assert train.is_compiled(params, "cpu", peak_flops) == compiled
    assert not train.is_compiled(params, "mps", peak_flops)
    for setting, expected in (("always", True), ("never", False)):
        chosen = replace(params, runtime=replace(params.runtime, compile=setting))
        assert train.is_compiled(chosen, "cpu", peak_flops) == expected


def test_a_run_that_diverged_twice_at_one_step_is_not_tried_again(tmp_path):
    def diverge(good_steps):
        with pytest.raises(DivergedError) as raised, train.at_most_twice_the_same_divergence(tmp_path):
            raise DivergedError(f"diverged after {good_steps}", good_steps)
        return str(raised.value)

    for good_steps in (7, 9, 9):
        assert diverge(good_steps) == f"diverged after {good_steps}"
    told = diverge(11)  # not even tried
    assert told.startswith("diverged after 9. So it went 2 times, and would again: change a parameter, or delete")
    (tmp_path / train.DIVERGED_FILE).write_text("{")
    assert diverge(9) == "diverged after 9"


def test_going_on_under_other_conditions_is_one_warning(capsys):
    now = trainer.environment(torch.device("cpu"))
    train.warn_of_other_bits(now, now)
    assert capsys.readouterr().err == ""
    train.warn_of_other_bits({**now, "threads": 77, "torch": "1.0"}, now)
    error = capsys.readouterr().err
    assert error.startswith(f"WARNING: this run was begun with torch 1.0 instead of {torch.__version__}, threads 77")
    assert error.count("\n") == 1


def test_without_a_compiler_training_goes_on_and_says_so(tokens, tiny_model, monkeypatch, capsys):
    def fail(*_):
        raise CompileError("no working C++ compiler")

    monkeypatch.setattr(Compute, "compile", fail)
    sampler = Sampler(open_tokens(tokens, "train"), TINY_TRAIN)
    assert not train.compile_for(Compute(tiny_model, torch.float32), sampler, TrainState.begin(torch.float32, 2))
    assert "goes on without it, slower: no working C++ compiler" in capsys.readouterr().err
