import subprocess
from argparse import Namespace
from dataclasses import fields, replace

import numpy as np
import pytest

from experiments import preset
from experiments.automatic import machine, probe
from experiments.automatic.plan import MIN_TRAINING_SHARE, SCORING_PASSES, VALIDATION_SHARE, Budget, choose
from experiments.automatic.probe import Speed
from experiments.automatic.recipe import RATES, SIZES, most_tokens, rates, recipe, weight_decay
from experiments.automatic.text import READ_BYTES, look_at
from experiments.automatic.values import run_values, training_values
from experiments.automatic.writing import as_yaml, with_changes
from gpt2 import device
from gpt2.__main__ import main
from gpt2.config import CorpusConfig, TokenizeConfig
from gpt2.errors import GPT2Error, UserError
from stages.params import Params, load_params
from tests.conftest import ROOT, TINY, our_text
from tests.experiments.texts import NOTE, NOVEL

LAPTOP = (ROOT / "presets/laptop.yaml").read_text()
PEAK = 1e11


def speed_of(flops_per_s):
    """What a machine of this speed measures."""

    def measure(chosen, *, thorough):
        flops = chosen.model.flops_per_token(chosen.model.block_size)
        step_s = chosen.step_tokens * flops / flops_per_s / (1.3 if thorough else 1.0)
        return Speed(step_s, 3 * flops_per_s / flops, 3 * flops_per_s / flops, 2.0, 10.0 if thorough else 0.0)

    return measure


def plan_for(text, minutes, flops_per_s=0.35 * PEAK, measure=None):
    told = []
    return choose(Budget(60 * minutes, 1.0, text), measure or speed_of(flops_per_s), PEAK, told.append), told


@pytest.mark.parametrize(
    ("text", "minutes", "is_early"),
    [(NOVEL, 3, False), (NOVEL, 20, True), (NOVEL, 300, False), (NOTE, 3, False), (NOTE, 20, False), (NOTE, 900, True)],
)
def test_a_plan_fills_the_time_that_pays_and_is_not_longer(text, minutes, is_early):
    plan, told = plan_for(text, minutes)
    assert plan.is_early == is_early
    most = most_tokens(text.tokens * (1 - plan.validation_fraction))
    if is_early:
        assert most <= plan.steps * plan.recipe.step_tokens < most + plan.recipe.step_tokens
    else:
        assert plan.seconds > 0.95 * 60 * minutes
        assert plan.steps * plan.recipe.step_tokens <= most
    assert plan.seconds <= 60 * minutes
    assert plan.steps * plan.speed.step_s > MIN_TRAINING_SHARE * 60 * minutes
    assert plan.recipe.evaluations >= -(-plan.steps // plan.eval_interval)
    assert len(told) >= 2
    comment = run_values(plan, text)["train", "max_steps"][1]
    assert ("fewer than fit the time, as more epochs do not lower the loss," in comment) == is_early


@pytest.mark.parametrize("text", [NOVEL, NOTE])
@pytest.mark.parametrize("minutes", [3, 8, 12, 20])
@pytest.mark.parametrize("faster", [1, 3, 10])
def test_some_size_fills_the_time(text, minutes, faster):
    plan, _ = plan_for(text, minutes, 0.35 * PEAK * faster)
    assert plan.seconds > 0.85 * 60 * minutes


def test_a_larger_size_is_tried_if_the_compiled_run_ends_early():
    plan, told = plan_for(NOVEL, 12, 3.5 * PEAK)
    compiled = [line for line in told if "compiled" in line]
    assert compiled[0].startswith("6 layers of width 512, compiled: expected loss 4.4")
    assert plan.recipe.model.n_embd == 512


def test_a_larger_size_that_does_not_fit_when_it_is_compiled_is_left_out():
    def measure(chosen, *, thorough):
        if thorough and chosen.model.n_embd > 448:
            raise UserError("too large")
        return speed_of(3.5 * PEAK)(chosen, thorough=thorough)

    plan, told = plan_for(NOVEL, 12, measure=measure)
    assert plan.recipe.model.n_embd == 448
    assert told[-1] == "6 layers of width 512, compiled: too large"


def test_time_that_no_size_fills_scores_more_held_out_text():
    def measure(chosen, *, thorough):
        if chosen.model.n_embd > 128:
            raise UserError("too large")
        return replace(speed_of(0.35 * PEAK)(chosen, thorough=thorough), scoring_tokens_per_s=130.0)

    plan, _ = plan_for(NOVEL, 30, measure=measure)
    assert plan.is_early
    assert plan.seconds > 0.95 * 60 * 30
    assert plan.validation_fraction * NOVEL.tokens * SCORING_PASSES / 130 > 1.5 * VALIDATION_SHARE * 60 * 30


def test_scoring_is_measured_where_the_memory_is_not_new(monkeypatch):
    params = load_params(ROOT / "presets/laptop.yaml")
    tokens = np.zeros(5000, dtype=np.uint16)
    scored = []
    clock = iter([0, 9, 10, 14, 20, 22, 30, 31])
    monkeypatch.setattr("gpt2.evaluation.scores.score", lambda model, batch, **_: scored.append(len(batch)))
    monkeypatch.setattr(probe.time, "perf_counter", lambda: next(clock))
    assert probe.measure_scoring(replace(params, model=TINY), tokens) == 8 * 128
    assert scored == 4 * [8 * 128 + 1]


def test_no_text_is_read_more_often_than_pays():
    assert most_tokens(300_000) == 3 * 300_000
    assert most_tokens(9_000) > 20 * 9_000  # short texts need the steps


def test_where_scoring_is_slow_less_is_held_out():
    def measure(chosen, *, thorough):
        fast = speed_of(0.35 * PEAK)(chosen, thorough=thorough)
        return replace(fast, scoring_tokens_per_s=fast.scoring_tokens_per_s / 30)

    (usual, _), (slow, _) = plan_for(NOVEL, 3), plan_for(NOVEL, 3, measure=measure)
    assert slow.validation_fraction < usual.validation_fraction / 2
    assert slow.steps < usual.steps
    assert slow.seconds <= 180


def test_more_time_and_a_faster_machine_train_larger_models_to_a_lower_loss():
    plans = [plan_for(NOVEL, 3)[0], plan_for(NOVEL, 60)[0], plan_for(NOVEL, 60, 350 * PEAK)[0]]
    losses, parameters = zip(*((each.loss, each.recipe.model.num_parameters()) for each in plans), strict=True)
    assert losses == tuple(sorted(losses, reverse=True))
    assert parameters[0] <= parameters[1] < parameters[2]


def test_the_size_with_the_lowest_expected_loss_is_found():
    budget, measure = Budget(600.0, 1.0, NOVEL), speed_of(0.35 * PEAK)
    losses = [budget.plan(guess, measure(guess, thorough=False)).loss for guess in budget_guesses(budget)]
    assert plan_for(NOVEL, 10)[0].recipe.model.n_embd == SIZES[losses.index(min(losses))][2]


def budget_guesses(budget):
    return [budget.recipe(size, budget.usual_tokens(size, PEAK)) for size in SIZES[:6]]


def test_sizes_that_do_not_fit_are_left_out():
    def measure(chosen, *, thorough):
        if chosen.model.n_embd > 128:
            raise UserError("too large")
        return speed_of(0.35 * PEAK)(chosen, thorough=thorough)

    plan, told = plan_for(NOVEL, 60, measure=measure)
    assert plan.recipe.model.n_embd == 128
    assert any("too large" in line for line in told)


def test_too_little_time_is_one_line_that_says_how_much_is_needed():
    with pytest.raises(UserError, match=r"the pipeline takes about 0\.\d minutes here; give it at least 1 minute$"):
        plan_for(NOVEL, 0.3)


def test_a_text_that_is_read_many_times_is_evaluated_often():
    once, often = (recipe((2, 2, 128), tokens, 300_000) for tokens in (200_000, 9_000_000))
    assert once.evaluations < often.evaluations


def test_learning_rates_fall_and_weights_decay_more_with_the_repetitions():
    assert rates(1.0) == rates(3.0) == RATES
    assert rates(11.3) == {"learning_rate": 3.2e-3, "muon_learning_rate": 5.3e-3}
    assert weight_decay(1.0) == 0.1 < weight_decay(3.0) < weight_decay(11.3) < weight_decay(1000.0)


@pytest.mark.parametrize(("minutes", "epochs", "decay"), [(3, 0.4, 0.1), (20, 3.0, 0.5)])
def test_the_weight_decay_is_that_of_the_epochs_which_the_plan_has(minutes, epochs, decay):
    plan, _ = plan_for(NOVEL, minutes)
    assert plan.epochs == pytest.approx(epochs, abs=0.1)
    assert run_values(plan, NOVEL)["train", "weight_decay"][0] == decay


def test_context_and_batch_grow_with_the_run_and_fit_the_text():
    short, long = (recipe((2, 2, 128), tokens, 1e9) for tokens in (500_000, 500e6))
    assert (short.model.block_size, short.step_tokens) == (128, 1024)
    assert (long.model.block_size, long.step_tokens) == (1024, 32768)
    assert recipe((2, 2, 128), 500_000, 1_000).model.block_size == 32


@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_takes_the_values_and_keeps_all_else(tmp_path, path):
    plan, _ = plan_for(NOVEL, 10)
    values = {**training_values(plan.recipe, NOVEL), **run_values(plan, replace(NOVEL, is_cut=True))}
    before = load_params(path)
    (tmp_path / "params.yaml").write_text(with_changes(path.read_text(), values, ["new"]))
    text, params = (tmp_path / "params.yaml").read_text(), load_params(tmp_path / "params.yaml")
    assert text.startswith("# new\n\ncorpus:\n")
    for section in fields(Params):
        theirs, ours = getattr(before, section.name), getattr(params, section.name)
        for key in fields(theirs):
            wanted = values.get((section.name, key.name), (getattr(theirs, key.name), ""))[0]
            assert getattr(ours, key.name) == wanted, key.name
    assert params.corpus.limit == f"{READ_BYTES // 10**6} MB"
    assert all(len(line) <= 150 for line in text.splitlines())
    assert text.count("\n") >= path.read_text().count("\n") - 10


def test_a_list_is_replaced_and_other_lines_stay():
    text = LAPTOP.replace("  source: tinyshakespeare\n", "  source: # mine\n    - a.txt\n    - b.txt\n")
    changed = with_changes(text, {("corpus", "source"): ("my novel.txt", ""), ("train", "unknown"): (1, "")})
    assert changed == LAPTOP.replace("source: tinyshakespeare\n", 'source: "my novel.txt" # mine\n')


@pytest.mark.parametrize(
    ("value", "expected"),
    [(6e-3, "6.0e-3"), (0.1, "0.1"), (0.0, "0.0"), (True, "true"), (None, "null"), (3, "3"), ("a/b.txt", "a/b.txt")],
)
def test_values_are_written_as_params_files_have_them(value, expected):
    assert as_yaml(value) == expected


@pytest.mark.parametrize("value", ["null", "a b", "hf://datasets/me/x", "3", "ü#.txt", "true", ""])
def test_texts_are_read_back_as_they_were(tmp_path, value):
    changed = with_changes(LAPTOP, {("export", "title"): (value or "x", "")})
    (tmp_path / "params.yaml").write_text(changed)
    assert load_params(tmp_path / "params.yaml").export.title == (value or "x")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with laptop's params, committed, and a text; on a machine whose speed is not measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/laptop.yaml").write_text(LAPTOP)
    (tmp_path / "params.yaml").write_text(LAPTOP.replace("seed: 1337", "seed: 1"))
    (tmp_path / "mine.txt").write_text(our_text(600))
    author = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "params.yaml"], [*author, "commit", "-qm", "start"]):
        subprocess.run(["git", *command], check=True)
    chosen = speed_of(1e10)

    def speed(_, params, __, *, thorough):
        train = params.train
        measured = recipe(SIZES[0], 1e6, 1e6)
        shape = replace(
            measured,
            model=params.model,
            batch_size=train.batch_size,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
        )
        return chosen(shape, thorough=thorough)

    monkeypatch.setattr(machine.Machine, "speed", speed)
    monkeypatch.setattr(device, "choose_precision", lambda *_: "float32")
    monkeypatch.setattr(device, "peak_flops", lambda *_: PEAK)
    return tmp_path


def test_the_params_are_written_and_valid(repository, capsys):
    assert main(["preset", "auto", "--minutes", "3", "--source", "mine.txt"]) == 0
    params = load_params(repository / "params.yaml")
    assert params.corpus.source == "mine.txt"
    assert params.train.seed == 1
    assert params.model.block_size == params.train.sequence_length
    assert 0 < params.train.warmup_steps < params.train.max_steps
    told = capsys.readouterr().err
    assert "the text: " in told
    assert "expected validation loss" in told
    text = (repository / "params.yaml").read_text()
    assert text.startswith("# Made by `make preset NAME=auto MINUTES=3` for ")
    assert [path.name for path in repository.glob("params*")] == ["params.yaml"]  # git has the old one


def test_params_that_git_does_not_have_are_copied_first(repository, capsys):
    (repository / "params.yaml").write_text(LAPTOP.replace("seed: 1337", "seed: 5"))
    assert main(["preset", "auto", "--source", "mine.txt"]) == 0
    assert main(["preset", "auto", "--source", "mine.txt"]) == 0  # those of the first one are not in git, either
    assert load_params(repository / "params.before-1.yaml").train.seed == 5
    assert (repository / "params.before-2.yaml").read_text().startswith("# Made by")
    assert "params.before-1.yaml: params.yaml as it was" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(repository, capsys):
    before = (repository / "params.yaml").read_text()
    assert main(["preset", "auto", "--source", "mine.txt", "--dry-run"]) == 0
    assert (repository / "params.yaml").read_text() == before
    assert "max_steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--minutes", "0"], "--minutes is 0; expected a number over 0, up to 100,000"),
        (["--minutes", "nan"], "--minutes is nan; expected a number over 0"),
        (["--source", "nowhere.txt"], "nowhere.txt"),
        (["--source", "short.txt"], "training takes at least 1,000"),
        (["--source", "mine.txt", "--minutes", "0.2"], "give it at least 1 minute"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(repository, capsys, options, expected):
    (repository / "short.txt").write_text("Only a few words. ")
    before = (repository / "params.yaml").read_text()
    assert main(["preset", "auto", *options]) != 0
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert expected in last
    assert (repository / "params.yaml").read_text() == before


def test_several_processes_are_refused(repository, capsys):
    text = LAPTOP.replace("device: auto", "device: cpu").replace("processes: auto", "processes: 2")
    (repository / "params.yaml").write_text(text)
    assert main(["preset", "auto", "--source", "mine.txt"]) == 2
    assert "measures one process, and 2 would train" in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(ROOT)
    (tmp_path / "mine.txt").write_text(our_text(400))
    config = CorpusConfig(str(tmp_path / "mine.txt"), None, "text", None)
    text = look_at(config, TokenizeConfig(0.1, "tail", False), tmp_path, 1)
    chosen = recipe((1, 1, 16), 1e5, text.tokens)
    values = training_values(chosen, text) | {("runtime", "compile"): ("never", ""), ("runtime", "threads"): (1, "")}
    content = with_changes(LAPTOP, values)
    ours = machine.Machine(tmp_path, text.distinct)
    first = ours.speed(preset.checked(content), content, thorough=False)
    assert first.step_s > 0
    assert first.set_up_s > 0.1
    assert first.compile_s == 0
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: pytest.fail("it is measured again"))
    assert ours.speed(preset.checked(content), content, thorough=False) == first
    other = with_changes(content, {("train", "weight_decay"): (5.0, ""), ("train", "learning_rate"): (1e-3, "")})
    assert ours.speed(preset.checked(other), other, thorough=False) == first


def test_a_measurement_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    failed = Namespace(returncode=74, stderr="compiling ...\nerror: out of memory", stdout="")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(GPT2Error, match=r"^measuring a training failed: out of memory$"):
        machine.Machine(tmp_path, 5).speed(preset.checked(LAPTOP), LAPTOP, thorough=False)
