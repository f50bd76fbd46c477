import json

import pytest

from benchmarks import tokenizing
from gpt2.data.documents import read_documents

TEXTS = [f"Text number {number}, of two lines.\nThe second line.\n".encode() for number in range(2000)]


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "package_texts", lambda: iter(TEXTS))
    tokenizing.write_texts(tmp_path / "texts", 80_000)
    return tmp_path / "texts"


def test_both_contenders_encode_the_same_text(texts, capsys):
    tokens = {}
    for name in ("ours", "tiktoken"):
        tokenizing.work(name, 1, str(texts))
        tokens[name] = json.loads(capsys.readouterr().out)["tokens"]
    borders = len(read_documents(texts / "documents.bin")) - 2  # <|endoftext|> within two splits
    assert tokens["ours"] == tokens["tiktoken"] + borders


def test_a_line_has_no_white_space(texts, tmp_path):
    tokenizing.write_line(tmp_path / "line", texts, 10_000)
    text = (tmp_path / "line/corpus.txt").read_text()
    assert len(text) >= 10_000
    assert text.split() == [text]
    assert len(read_documents(tmp_path / "line/documents.bin")) == 1


def test_the_report_compares_with_tiktoken():
    rows = [
        {"name": name, "processes": count, "mb_per_s": speed, "peak_bytes": 3e8}
        for name, count, speed in (("ours", 1, 9.0), ("tiktoken", 1, 10.0), ("ours", 2, 18.0), ("tiktoken", 2, 12.0))
    ]
    result = {"cpu": "a CPU", "megabytes": 200, "documents": 3, "rounds": 2, "rows": rows, "line": rows[0]}
    text = tokenizing.table(result)
    assert "| the tokenize stage | 1 | 9.0 | 0.90 | 300 MB |" in text
    assert "2.00 times as fast as one" in text
