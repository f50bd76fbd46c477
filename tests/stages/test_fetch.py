import json
import subprocess
import sys

import pytest

from gpt2.data.documents import read_documents
from stages import paths
from tests.conftest import ROOT
from tests.gpt2.data.sources.hub import COMMIT, hub_of


@pytest.fixture
def project(tmp_path):
    """A folder with params; `project.fetch(source=..., ...)` runs the stage there as DVC would."""

    class Project:
        folder = tmp_path
        corpus = tmp_path / paths.CORPUS
        linked = tmp_path / paths.LINKED

        def fetch(self, source, fallback="null", text_column="text", limit="null", **environment):
            text = (ROOT / "params.yaml").read_text()
            for old, new in (
                ("source: tinyshakespeare", f"source: {source}"),
                ("fallback: python-docs", f"fallback: {fallback}"),
                ("text_column: text", f"text_column: {text_column}"),
                ("limit: null", f"limit: {limit}"),
            ):
                assert text.count(old) == 1
                text = text.replace(old, new)
            (tmp_path / "params.yaml").write_text(text)
            return subprocess.run(
                [sys.executable, "-m", "stages.fetch"],
                cwd=tmp_path,
                env={"PYTHONPATH": str(ROOT), "PATH": "", **environment},
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


def test_a_pattern_and_a_data_set_become_one_corpus(project):
    for name in ("a.jsonl", "b.jsonl"):
        (project.folder / name).write_text(json.dumps({"body": name}) + "\n" + json.dumps({"body": None}) + "\n")
    with hub_of({"data/c.csv": b"id,body\n1,from the hub\n"}) as hub:
        result = project.fetch(
            "['*.jsonl', hf://datasets/me/texts@v1/data]", text_column="body", limit="20 bytes", HF_ENDPOINT=hub.url
        )
    assert result.returncode == 0, result.stderr
    assert "20 characters in 0 lines and 3 documents (2 without text skipped)" in result.stderr
    assert project.corpus.read_text() == "a.jsonlb.jsonlfrom t"
    assert read_documents(project.folder / paths.DOCUMENTS, project.corpus)["end"].tolist() == [7, 14, 20]
    facts = project.facts()
    assert (facts["documents"], facts["skipped"], facts["revision"]) == (3, 2, COMMIT)
    assert facts["name"] == "*.jsonl, hf://datasets/me/texts@v1/data"
    assert facts["source"] == f"{project.folder}/*.jsonl, hf://datasets/me/texts@{COMMIT}/data"
    assert sorted(link.readlink().name for link in project.linked.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_a_revision_that_is_gone_is_a_one_line_error(project):
    with hub_of({"a.txt": b"a"}) as hub:
        result = project.fetch("hf://datasets/me/texts@gone", HF_ENDPOINT=hub.url)
    assert result.returncode == 74
    assert "error: cannot read hf://datasets/me/texts@gone: there is no such revision; check the" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_fallback_prints_a_warning(project):
    result = project.fetch("http://127.0.0.1:9/text.txt", "python-docs")
    assert result.returncode == 0, result.stderr
    assert "WARNING: cannot download http://127.0.0.1:9/text.txt" in result.stderr
    assert "Using the fallback corpus 'python-docs'" in result.stderr
    facts = project.facts()
    assert (facts["name"], facts["documents"], facts["revision"]) == ("python-docs", 1, None)
    assert "cannot download" in facts["fallback_reason"]


@pytest.mark.parametrize(
    ("source", "code", "expected"),
    [
        ("http://127.0.0.1:9/text.txt", 74, "cannot download http://127.0.0.1:9/text.txt"),
        ("nowhere.txt", 2, "'nowhere.txt' is not a known corpus (tinyshakespeare, python-docs) or a URL"),
        ("none/*.txt", 2, "'none/*.txt': no file matches"),
        ("hf://datasets/texts", 2, "is not of the form hf://datasets/OWNER/NAME"),
        ("broken.jsonl", 2, "broken.jsonl, line 2: not JSON"),
        ("columns.csv", 2, "has no column 'text', but 'id', 'body'; set corpus.text_column"),
        ("empty.txt", 2, "has no text"),
        ("latin.txt", 2, "is not UTF-8: byte 0xe9 at offset 3"),
    ],
)
def test_a_failed_fetch_is_a_one_line_error(project, source, code, expected):
    (project.folder / "empty.txt").write_text("")
    (project.folder / "latin.txt").write_bytes(b"caf\xe9")
    (project.folder / "broken.jsonl").write_text('{"text": "a"}\n{"text"')
    (project.folder / "columns.csv").write_text("id,body\n")
    result = project.fetch(source)
    assert result.returncode == code
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert not project.corpus.exists()
    assert not (project.folder / paths.DOCUMENTS).exists()


def test_an_output_folder_that_cannot_be_written_is_one_line(project):
    (project.folder / "data").write_text("a file where the folder should be")
    (project.folder / "mine.txt").write_text("text")
    result = project.fetch("mine.txt")
    assert result.returncode == 74
    assert "check that the folder can be written to" in result.stderr
    assert result.stderr.count("\n") == 1
