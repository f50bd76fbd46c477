from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages import paths
from tests.conftest import ROOT


def test_each_path_is_an_output_of_dvc():
    stages = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]
    outputs = set()
    for stage in stages.values():
        for kind in ("outs", "metrics", "plots"):
            for entry in stage.get(kind, []):
                outputs.add(entry if isinstance(entry, str) else next(iter(entry)))
    for path in (paths.CORPUS, paths.CORPUS_FACTS, paths.TOKENS, paths.MODELS, paths.SPACE, paths.HUGGING_FACE):
        assert path.as_posix() in outputs
    assert paths.SEGMENT_LOSSES.as_posix() in outputs
    for folder in (paths.TRAIN_REPORT, paths.EVALUATE_REPORT):
        assert f"{folder.as_posix()}/metrics.json" in outputs
    assert paths.LINKED.as_posix() in stages["fetch"]["deps"]


def test_the_real_root_of_an_experiments_copy(monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_ROOT", "/home/me/project/.dvc/tmp/exps/standalone/tmpabc")
    assert paths.real_root() == Path("/home/me/project")
    monkeypatch.setenv("DVC_ROOT", "/home/me/project")
    assert paths.real_root() == Path("/home/me/project")
    monkeypatch.delenv("DVC_ROOT")
    monkeypatch.chdir(tmp_path)
    assert paths.real_root() == tmp_path


@pytest.mark.parametrize("mounted", [False, True])
def test_checkpoints_go_to_a_mounted_drive(monkeypatch, tmp_path, mounted):
    drive = tmp_path / "MyDrive"
    if mounted:
        drive.mkdir()
    monkeypatch.setattr(paths, "DRIVE", drive)
    monkeypatch.setenv("DVC_ROOT", "/content/project")
    expected = drive / "project/checkpoints" if mounted else Path("/content/project/checkpoints")
    assert paths.checkpoints(None) == expected
    assert paths.checkpoints("elsewhere") == Path("/content/project/elsewhere")
    assert paths.checkpoints("/mnt/big") == Path("/mnt/big")
