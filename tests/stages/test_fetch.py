import json
import subprocess
import sys

import pytest

from stages import paths
from tests.conftest import ROOT


@pytest.fixture
def project(tmp_path):
    """A folder with params; `project.fetch(source=..., fallback=...)` runs the stage there as DVC would."""

    class Project:
        folder = tmp_path
        corpus = tmp_path / paths.CORPUS
        linked = tmp_path / paths.LINKED

        def fetch(self, source, fallback="null"):
            text = (ROOT / "params.yaml").read_text()
            text = text.replace("source: tinyshakespeare", f"source: {source}")
            (tmp_path / "params.yaml").write_text(text.replace("fallback: python-docs", f"fallback: {fallback}"))
            return subprocess.run(
                [sys.executable, "-m", "stages.fetch"],
                cwd=tmp_path,
                env={"PYTHONPATH": str(ROOT), "PATH": ""},
                capture_output=True,
                text=True,
            )

        def facts(self):
            return json.loads((tmp_path / paths.CORPUS_FACTS).read_text())

    return Project()


def test_a_file_becomes_the_corpus(project):
    (project.folder / "mine.txt").write_text("my own text\n")
    result = project.fetch("mine.txt")
    assert result.returncode == 0, result.stderr
    assert project.corpus.read_text() == "my own text\n"
    assert project.facts()["characters"] == 12
    assert project.facts()["fallback_reason"] is None
    (link,) = project.linked.iterdir()
    assert link.resolve() == project.folder / "mine.txt"


def test_links_follow_the_source(project):
    folder = project.folder / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(name)
    project.fetch("texts")
    assert sorted(link.readlink().name for link in project.linked.iterdir()) == ["a.txt", "b.txt"]
    project.fetch("python-docs")
    assert list(project.linked.iterdir()) == []
    assert (folder / "a.txt").read_text() == "a.txt"


def test_a_fallback_prints_a_warning(project):
    result = project.fetch("http://127.0.0.1:9/text.txt", "python-docs")
    assert result.returncode == 0, result.stderr
    assert "WARNING: cannot download http://127.0.0.1:9/text.txt" in result.stderr
    assert "Using the fallback corpus 'python-docs'" in result.stderr
    facts = project.facts()
    assert facts["name"] == "python-docs"
    assert "cannot download" in facts["fallback_reason"]


@pytest.mark.parametrize(
    ("source", "code", "expected"),
    [
        ("http://127.0.0.1:9/text.txt", 74, "cannot download http://127.0.0.1:9/text.txt"),
        ("nowhere.txt", 2, "'nowhere.txt' is not a known corpus (tinyshakespeare, python-docs) or an http(s) URL"),
        ("empty.txt", 2, "has no text"),
        ("latin.txt", 2, "is not UTF-8: byte 0xe9 at offset 3"),
    ],
)
def test_a_failed_fetch_is_a_one_line_error(project, source, code, expected):
    (project.folder / "empty.txt").write_text("")
    (project.folder / "latin.txt").write_bytes(b"caf\xe9")
    result = project.fetch(source)
    assert result.returncode == code
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert not project.corpus.exists()


def test_an_output_folder_that_cannot_be_written_is_one_line(project):
    (project.folder / "data").write_text("a file where the folder should be")
    (project.folder / "mine.txt").write_text("text")
    result = project.fetch("mine.txt")
    assert result.returncode == 74
    assert "check that the folder can be written to" in result.stderr
    assert result.stderr.count("\n") == 1
