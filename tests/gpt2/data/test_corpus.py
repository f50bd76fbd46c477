import hashlib
import json
import os
import tracemalloc

import pytest

from gpt2.data.corpus import local_files, write_corpus
from gpt2.data.documents import read_documents
from gpt2.data.limit import parse_limit
from gpt2.data.sources import text as source_text
from gpt2.errors import FileError, UserError
from tests.gpt2.data.sources.server import TEXT, send, web_server


@pytest.fixture
def server():
    with web_server() as server:
        yield server


def write(source, tmp_path, **options):
    target = tmp_path / "out" / "corpus.txt"
    facts = write_corpus(
        source, target, target.with_name("documents.bin"), downloads=tmp_path / "downloads", roots=[tmp_path], **options
    )
    return facts, target.read_bytes()


def documents(tmp_path):
    """The texts of the documents that were written."""
    content = (tmp_path / "out/corpus.txt").read_bytes()
    ends = read_documents(tmp_path / "out/documents.bin", tmp_path / "out/corpus.txt")["end"].tolist()
    return [content[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]


def jsonl(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_a_file_is_used_unchanged(tmp_path):
    text = "Zwölf Boxkämpfer\n\nund <|endoftext|> 漢字, no line end"
    (tmp_path / "mine.txt").write_text(text)
    facts, content = write("mine.txt", tmp_path)
    assert content.decode() == text
    assert (facts.characters, facts.bytes, facts.lines) == (len(text), len(text.encode()), 2)
    assert facts.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert (tmp_path / "mine.txt").read_text() == text


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 1 << 20])
def test_line_ends_and_the_byte_order_mark_are_normalized(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(source_text, "CHUNK_BYTES", chunk_bytes)
    (tmp_path / "dos.txt").write_bytes("\ufeffone\r\ntwo\rthree é\n\r\r\nend\r".encode())
    assert write("dos.txt", tmp_path)[1].decode() == "one\ntwo\nthree é\n\n\nend\n"


@pytest.mark.parametrize("chunk_bytes", [1, 3, 1 << 20])
def test_invalid_utf8_is_reported_with_its_offset(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(source_text, "CHUNK_BYTES", chunk_bytes)
    (tmp_path / "latin.txt").write_bytes("é caf".encode() + b"\xe9 noir")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 6;"):
        write("latin.txt", tmp_path)
    assert not (tmp_path / "out/corpus.txt").exists()


def test_a_truncated_character_at_the_end_is_not_utf8(tmp_path):
    (tmp_path / "cut.txt").write_bytes("abcé".encode()[:-1])
    with pytest.raises(UserError, match="offset 3"):
        write("cut.txt", tmp_path)


def test_utf16_is_detected(tmp_path):
    (tmp_path / "wide.txt").write_text("hello", encoding="utf-16")
    with pytest.raises(UserError, match="UTF-16"):
        write("wide.txt", tmp_path)


@pytest.mark.parametrize("content", [b"", b"  \n\t\n", "\ufeff".encode()])
def test_an_empty_corpus_is_refused(tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(UserError, match="has no text"):
        write("empty.txt", tmp_path)
    assert not (tmp_path / "out/corpus.txt").exists()


def test_python_docs_is_a_corpus_of_megabytes(tmp_path):
    facts, content = write("python-docs", tmp_path)
    assert facts.characters > 1_000_000
    assert facts.source.startswith("python-docs (CPython 3.")
    assert b"for loop" in content or b"for statement" in content
    assert write("python-docs", tmp_path)[0].sha256 == facts.sha256


def test_a_url_is_downloaded_and_read_by_its_suffix(server, tmp_path):
    facts, content = write(server.url, tmp_path)
    assert content == TEXT
    assert facts.source == server.url
    server.reply = send(jsonl("a", "b").encode())
    address = server.url.replace(".txt", ".jsonl?token=x")
    facts, content = write([server.url.replace(".txt", ".jsonl?token=x"), address], tmp_path)
    assert content == b"abab"
    assert len(list((tmp_path / "downloads").iterdir())) == 2


def test_a_folder_is_a_document_for_each_file(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("first")
    (folder / "b.md").write_text("\n second\n")
    (folder / "c.txt").write_text(" \n")
    (folder / "d.jsonl").write_text(jsonl("third", None, "", "fourth"))
    facts, _ = write("texts", tmp_path)
    assert documents(tmp_path) == ["first", "\n second\n", "third", "fourth"]
    assert (facts.documents, facts.skipped, facts.revision) == (4, 3, None)
    assert facts.source == str(folder)


def test_a_list_of_sources_is_read_in_its_order(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2.data.corpus.python_docs", lambda progress: iter(["of ", "Python"]))
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.csv").write_text("id,body\n1,one\n2,two\n")
    facts, _ = write(["b.txt", "a.csv", "python-docs", "*.txt"], tmp_path, text_column="body")
    assert documents(tmp_path) == ["b", "one", "two", "of Python", "b"]
    assert facts.source.startswith(f"{tmp_path / 'b.txt'}, {tmp_path / 'a.csv'}, python-docs (CPython")
    assert facts.licence == "unknown, Python Software Foundation License"
    assert local_files(["b.txt", "python-docs", "https://x.org/a.txt", "s3://b/a", "*.txt"], [tmp_path]) == [
        tmp_path / "b.txt"
    ]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("2 documents", ["one two", "three"]), ("9 bytes", ["one two", "th"]), ("3 tokens", ["one two", "three"])],
)
def test_a_limit_takes_the_first(tmp_path, limit, expected):
    (tmp_path / "mine.jsonl").write_text(jsonl("one two", " ", "three", "four"))
    facts, _ = write("mine.jsonl", tmp_path, limit=parse_limit(limit))
    assert documents(tmp_path) == expected
    assert facts.documents == 2


def test_a_limit_in_the_middle_of_a_character_leaves_no_empty_document(tmp_path):
    (tmp_path / "mine.jsonl").write_text(jsonl("one", "漢字"))
    assert write("mine.jsonl", tmp_path, limit=parse_limit("4 bytes"))[0].documents == 1
    assert documents(tmp_path) == ["one"]


def test_an_error_in_a_later_file_leaves_the_former_corpus(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.jsonl").write_text(jsonl("fine") + "{")
    write("good.txt", tmp_path)
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: not JSON"):
        write(["good.txt", "bad.jsonl"], tmp_path)
    assert documents(tmp_path) == ["good"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"corpus.txt", "documents.bin"}


def test_records_never_stand_beside_another_text(tmp_path, monkeypatch):
    (tmp_path / "old.txt").write_text("old text")
    (tmp_path / "new.txt").write_text("new text")
    write("old.txt", tmp_path)
    replace = os.replace

    def killed(source, target):
        if target.name == "documents.bin":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write("new.txt", tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["corpus.txt"]


def test_a_disk_that_is_too_small_is_noticed_before_the_work(tmp_path):
    with (tmp_path / "mine.txt").open("wb") as file:
        file.truncate(1 << 43)  # a sparse file
    with pytest.raises(FileError, match=r"needs about 8,796,093,022,208 bytes, but the disk of .* has .* free"):
        write("mine.txt", tmp_path)
    assert not (tmp_path / "out").exists()
    assert len(write("mine.txt", tmp_path, limit=parse_limit("3 bytes"))[1]) == 3


def test_memory_does_not_grow_with_the_file(tmp_path):
    with (tmp_path / "mine.jsonl").open("w") as file:
        for number in range(64):
            file.write(jsonl(f"{number} " * 100_000))
    (tmp_path / "line.txt").write_text("words without end " * 2_000_000)
    tracemalloc.start()
    for source in ("mine.jsonl", "line.txt"):
        write_corpus(source, tmp_path / "c.txt", tmp_path / "d.bin", downloads=tmp_path, roots=[tmp_path])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20
