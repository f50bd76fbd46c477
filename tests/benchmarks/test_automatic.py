import pytest

from benchmarks import automatic
from stages.params import check_params, load_params
from tests.conftest import ROOT


class FakeClone:
    """A clone in which training takes 2 s a step, and evaluations 30 s in all."""

    step_s = 2.0

    def __init__(self, folder, text):
        self.folder, self.commands = folder, []
        folder.mkdir()

    def run(self, *command):
        self.commands.append(command)
        if command[:3] == ("gpt2", "preset", "auto"):
            header = "# Expected validation loss 4.89 (4.40 to 5.38), from\n# the size.\n\n"
            self.write_params(header + (ROOT / "presets/laptop.yaml").read_text().replace("900", "100"))
        return 7.0

    def write_params(self, content):
        (self.folder / "params.yaml").write_text(content)

    def training(self):
        steps = load_params(self.folder / "params.yaml").train.max_steps
        return {
            "best_val_loss": 5.0 - steps / 100,
            "steps": steps,
            "elapsed_s": 30.0 + steps * (self.step_s if self.folder.name == "laptop" else 2.0),
        }


@pytest.mark.parametrize(("step_s", "steps", "unchanged"), [(2.0, 100, None), (0.1, 2000, 5.0 - 9.0)])
def test_the_preset_laptop_trains_for_as_many_seconds_and_unchanged_if_that_is_shorter(
    tmp_path, monkeypatch, step_s, steps, unchanged
):
    monkeypatch.setattr(automatic, "Clone", FakeClone)
    monkeypatch.setattr(FakeClone, "step_s", step_s)
    found = automatic.side_by_side(tmp_path, "text", 3.0)
    assert found["steps"] == [100, steps]
    assert found["training_s"] == pytest.approx([230.0, 230.0])
    assert found["laptop_unchanged"] == unchanged
    assert (found["expected"], found["repro_s"]) == (4.89, 7.0)


def test_params_of_the_preset_laptop_for_a_text():
    from ruamel.yaml import YAML

    content = YAML(typ="safe").load(automatic.laptop_params(90, 9, 0.05))
    params = check_params(content, "params.yaml")
    assert params.corpus.source == "data/own.txt"
    assert params.tokenize.validation_fraction == 0.05
    assert (params.train.max_steps, params.train.warmup_steps, params.train.eval_interval) == (90, 2, 10)
    laptop = load_params(ROOT / "presets/laptop.yaml").train
    assert (laptop.max_steps / laptop.eval_interval, laptop.warmup_steps / laptop.max_steps) == (
        automatic.EVALUATIONS,
        automatic.WARM_UP,
    )
    assert laptop.batch_size * laptop.sequence_length * laptop.gradient_accumulation_steps == automatic.STEP_TOKENS


def test_the_table_has_a_line_for_each_run():
    run = {"text": "note", "minutes": 3.0, "machine": "a CPU", "repro_s": 183.0, "expected": 6.0, "loss": 5.9}
    run["training_s"] = [90.2, 91.0]
    short = {**run, "minutes": 1.0, "laptop": 7.0}
    lines = automatic.table([{**run, "laptop": 6.5, "laptop_unchanged": 6.25}, short]).splitlines()
    assert lines[-2:] == [
        "| a CPU | note | 1 | 3.0 | 6.00 | 5.90 | 7.00 |  | 90; 91 |",
        "| a CPU | note | 3 | 3.0 | 6.00 | 5.90 | 6.50 | 6.25 | 90; 91 |",
    ]
    assert lines[-4].count("|") == lines[-3].count("|") == 10


def test_texts_are_there_without_a_network():
    code = automatic.python_code(100_000)
    assert len(code.encode()) == pytest.approx(100_000, abs=4)
    assert code == automatic.python_code(100_000)
