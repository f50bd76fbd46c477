"""Outputs as links into DVC's cache, for data that is too large to be stored twice."""

import re

import pytest

from tests.project import Project

OUTPUTS = (".dvc/cache/files", "data/tokens", "models", "dist")


def used_bytes(folder):
    """What the outputs and the cache take on the disk: a file with several names counts once."""
    files = [path for name in OUTPUTS for path in (folder / name).rglob("*") if path.is_file()]
    return sum({file.stat().st_ino: file.stat().st_size for file in files}.values())


def output_bytes(folder):
    return sum(path.stat().st_size for name in OUTPUTS[1:] for path in (folder / name).rglob("*") if path.is_file())


@pytest.mark.slow
def test_links_spare_the_second_copy(tmp_path):
    project = Project(tmp_path)
    folder = project.folder
    project.run("dvc", "repro")
    assert used_bytes(folder) > 1.5 * output_bytes(folder)
    project.run("dvc", "config", "--local", "cache.type", "hardlink,symlink,copy")
    project.run("dvc", "checkout", "--relink")
    assert used_bytes(folder) <= 1.1 * output_bytes(folder)
    samples = project.read("reports/evaluate/samples.json")

    project.change(evaluate={"max_new_tokens": 6})  # rewrites outputs that are links
    output = project.run("dvc", "repro")
    assert re.findall(r"Running stage '([a-z-]+)'", output) == ["evaluate", "export-to-space"]
    assert (folder / "models/model.safetensors").stat().st_nlink > 1
    assert (folder / "dist/space/gpt_model.pt").stat().st_nlink > 1

    project.change(evaluate={"max_new_tokens": 12})  # from the cache, which nothing wrote to
    project.run("dvc", "repro")
    assert project.read("reports/evaluate/samples.json") == samples
    assert "up to date" in project.run("dvc", "status")
    project.run("dvc", "unprotect", "models")
    assert (folder / "models/model.safetensors").stat().st_nlink == 1
