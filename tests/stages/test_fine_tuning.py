"""Fine-tuning through the pipeline: from a local folder of weights, all of them trained or some blocks frozen."""

import pytest

from gpt2.hub.export import save_pretrained
from gpt2.model.storage import load_folder
from tests.conftest import our_text
from tests.project import Project

SHORT = {"max_steps": 8, "warmup_steps": 1, "eval_interval": 4}


@pytest.mark.slow
def test_fine_tuning_beats_training_from_scratch_in_as_many_steps(tmp_path):
    project = Project(tmp_path)
    project.change(model={"n_layer": 2}, train={"max_steps": 120, "eval_interval": 40})
    project.run("dvc", "repro", "train")
    base = load_folder(tmp_path / "models")
    save_pretrained(base, tmp_path / "base")
    (tmp_path / "mine.txt").write_text(our_text(200, seed=1))

    def loss(**changes):
        project.change(train={**SHORT, **changes})
        project.output = project.run("dvc", "repro", "train")
        return project.read("reports/train/metrics.json")["best_val_loss"]

    scratch = loss()
    all_trained = loss(init_from="./base")
    assert all_trained < scratch - 1
    frozen = loss(init_from="./base", freeze_layers=1)
    assert frozen < scratch - 1
    assert f"training {base.config.num_trained_parameters(1):,} of {base.config.num_parameters():,} parameters" in (
        project.output
    )
    weights, before = (dict(model.named_parameters()) for model in (load_folder(tmp_path / "models"), base))
    kept = {name for name in weights if weights[name].equal(before[name])}
    assert kept == {name for name in weights if ".h.0." in name or ".wte." in name or ".wpe." in name}
