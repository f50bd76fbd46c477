import subprocess
import sys
from dataclasses import fields

import pytest
from ruamel.yaml import YAML

from gpt2.errors import UserError
from stages.params import Params, load_params
from tests.conftest import ROOT

COMMITTED = (ROOT / "params.yaml").read_text()
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


def load(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    return load_params(tmp_path / "params.yaml")


def change(old, new):
    assert COMMITTED.count(old) == 1, old
    return COMMITTED.replace(old, new)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_each_preset_is_complete_and_valid(path):
    params = load_params(path)
    sections = YAML(typ="safe", pure=True).load(path.read_text())
    for section in fields(Params):
        assert list(sections[section.name]) == [f.name for f in fields(getattr(params, section.name))]


def test_the_presets_are_there_and_laptop_is_the_default():
    assert [path.stem for path in PRESETS] == [
        "colab-t4",
        "finetune",
        "fineweb-124m-muon",
        "fineweb-124m",
        "gpt2-large-8gpu",
        "gpt2-medium-8gpu",
        "gpt2-xl-8gpu",
        "gpu",
        "kaggle-2xt4",
        "laptop",
        "seed",
        "tinystories",
        "wikitext",
    ]
    assert (ROOT / "presets/laptop.yaml").read_text() == COMMITTED


@pytest.mark.parametrize(
    ("preset", "tokens"),
    [("fineweb-124m", 10e9), ("fineweb-124m-muon", 5e9), ("tinystories", 470e6), ("wikitext", 3 * 118e6)],
)
def test_presets_of_data_sets_train_on_as_many_tokens_as_they_say(preset, tokens):
    train = load_params(ROOT / f"presets/{preset}.yaml").train
    assert train.max_steps * train.tokens_per_step == pytest.approx(tokens, rel=0.02)


def test_seed_has_the_settings_of_the_original_project():
    params = load_params(ROOT / "presets/seed.yaml")
    train = params.train
    assert params.model.num_parameters() == 124_439_808
    assert (train.batch_size, train.sequence_length, train.gradient_accumulation_steps) == (32, 128, 2)
    assert (train.max_steps, train.warmup_steps, train.eval_interval) == (2500, 50, 250)
    assert (train.learning_rate, train.min_learning_rate) == (3e-4, 3e-5)
    assert (train.optimizer, train.schedule, train.label_smoothing) == ("adamw", "cosine", 0.0)
    assert params.corpus.source == "tinyshakespeare"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("max_steps: ", "max_step: ", "unknown key train.max_step; did you mean 'max_steps'?"),
        ("gradient_accumulation_steps: ", "accumulation_steps: ", "was renamed to train.gradient_accumulation_steps"),
        ("  n_layer: 4\n", "", "model.n_layer is missing"),
        ("n_layer: 4", "n_layer: four", "model.n_layer is 'four'; expected an integer"),
        ("n_layer: 4", "n_layer: 4.0", "model.n_layer is 4.0; expected an integer"),
        ("n_layer: 4", "n_layer: true", "model.n_layer is True; expected an integer"),
        ("n_layer: 4", "n_layer: 0", "model.n_layer is 0; expected greater than 0"),
        ("n_layer: 4", "n_layer:", "model.n_layer is None"),
        ("n_layer: 4", "n_layer: 4\n  n_layer: 5", 'duplicate key "n_layer"'),
        ("n_head: 4", "n_head: 3", "model: n_embd 256 is not a multiple of n_head 3"),
        ("learning_rate: 1.2e-2", "learning_rate: '1e-3'", "train.learning_rate is '1e-3', which is text"),
        ("learning_rate: 1.2e-2", "learning_rate: .inf", "train.learning_rate is inf"),
        ("learning_rate: 1.2e-2", "learning_rate: .nan", "train.learning_rate is nan"),
        ("learning_rate: 1.2e-2", "learning_rate: [1]", "train.learning_rate is [1]"),
        ("beta1: 0.9", "beta1: 1.0", "train.beta1 is 1.0; expected less than 1"),
        ("dropout: 0.0", "dropout: 1.0", "train.dropout is 1.0; expected less than 1"),
        ("patience: null", "patience: 0", "train.patience is 0; expected greater than 0"),
        ("warmup_steps: 20", "warmup_steps: 5000", "train: warmup_steps 5000 is longer than the run"),
        ("sequence_length: 128", "sequence_length: 300", "train.sequence_length 300 is over the context"),
        ("freeze_layers: 0", "freeze_layers: -1", "train.freeze_layers is -1; expected greater than or equal to 0"),
        ("freeze_layers: 0", "freeze_layers: 1", "train: freeze_layers 1 keeps random weights as they are"),
        ("vocab_size: 50257", "vocab_size: 50000", "model.vocab_size 50000 is less than the tokenizer's 50257"),
        ("fallback: python-docs", "fallback: nothing", "corpus.fallback is 'nothing'; expected null or one of"),
        ("source: tinyshakespeare", "source: ''", "corpus.source is ''"),
        ("source: tinyshakespeare", "source: 3", "corpus.source is 3; expected a string or a list"),
        ("source: tinyshakespeare", "source: []", "[]; expected a string or a list with at least 1 item"),
        ("source: tinyshakespeare", "source: [a, '']", "params.yaml: corpus.source.1 is ''; expected at least 1 char"),
        ("text_column: text", "text_column:", "corpus.text_column is None; expected a string"),
        ("limit: null", "limit: 10 words", "corpus.limit is '10 words'; expected null or a text such as"),
        ("limit: null", "limit: 10", "corpus.limit is 10; expected a string"),
        ("device: auto", "device: tpu", "runtime.device is 'tpu'; expected 'auto', 'cuda', 'mps' or 'cpu'"),
        ("tokenize:", "tokenise:", "unknown key tokenise; did you mean 'tokenize'?"),
        ("corpus:\n", "extra: 1\n\ncorpus:\n", "unknown key extra"),
        ("validation_fraction: 0.1", "validation_fraction: 1", "tokenize.validation_fraction is 1"),
        ("corpus:\n", "corpus: [\n", "cannot read"),
    ],
)  # fmt: skip
def test_an_invalid_value_is_a_one_line_error_that_names_it(tmp_path, old, new, expected):
    with pytest.raises(UserError) as raised:
        load(tmp_path, change(old, new))
    message = str(raised.value)
    assert expected in message
    assert "\n" not in message
    assert "params.yaml" in message


def test_a_block_is_left_to_train(tmp_path):
    text = change("freeze_layers: 0", "freeze_layers: 4").replace("init_from: scratch", "init_from: gpt2")
    with pytest.raises(UserError, match=r"train\.freeze_layers 4 leaves no block to train; .*model\.n_layer 4"):
        load(tmp_path, text)
    assert load(tmp_path, text.replace("freeze_layers: 4", "freeze_layers: 3")).train.freeze_layers == 3


def test_all_problems_are_reported_at_once(tmp_path):
    text = COMMITTED.replace("n_layer: 4", "n_layer: -1").replace("beta2: 0.99", "beta2: x")
    with pytest.raises(UserError, match=r"(?s)has 2 problems:.*model\.n_layer.*train\.beta2"):
        load(tmp_path, text)


@pytest.mark.parametrize("text", ["", "- 1\n", "just text", "corpus: 3\n"])
def test_invalid_yaml_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"params\.yaml"):
        load(tmp_path, text)


def test_a_missing_file_error_names_the_command_that_creates_it(tmp_path):
    with pytest.raises(UserError, match="make preset NAME=laptop"):
        load_params(tmp_path / "params.yaml")


def test_a_float_may_be_written_without_a_point(tmp_path):
    assert load(tmp_path, change("learning_rate: 1.2e-2", "learning_rate: 3e-4")).train.learning_rate == 3e-4


def test_a_source_may_be_a_list_and_a_limit_a_text(tmp_path):
    text = change("source: tinyshakespeare", "source: [a.txt, 'hf://datasets/me/texts']")
    corpus = load(tmp_path, text.replace("limit: null", "limit: 500 MB")).corpus
    assert corpus.source == ["a.txt", "hf://datasets/me/texts"]
    assert corpus.limit == "500 MB"


@pytest.mark.parametrize("stage", ["fetch", "tokenize", "train", "evaluate", "export_to_space"])
def test_every_stage_refuses_wrong_params_before_it_imports_torch(tmp_path, stage):
    (tmp_path / "params.yaml").write_text(change("n_head: 4", "n_head: 3"))
    program = (
        f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r})\n"
        f"try: runpy.run_module('stages.{stage}', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "2 False\n", result.stderr
    assert result.stderr == "error: params.yaml: model: n_embd 256 is not a multiple of n_head 3\n"
