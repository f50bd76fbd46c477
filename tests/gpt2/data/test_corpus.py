import hashlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from gpt2.data import corpus
from gpt2.data.corpus import write_corpus
from gpt2.data.download import Download, DownloadError, download_file
from gpt2.data.python_docs import prose
from gpt2.errors import FileError, UserError

TEXT = b"All that is solid.\nAll that is not.\n"


@pytest.fixture
def server():
    """A web server; `server.reply` is what it does for the next requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests += 1
            server.reply(self)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.reply = 0, ok
    server.url = f"http://127.0.0.1:{server.server_port}/text.txt"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ok(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(TEXT)))
    handler.end_headers()
    handler.wfile.write(TEXT)


def cut_off(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", str(2 * len(TEXT)))
    handler.end_headers()
    handler.wfile.write(TEXT)


def not_found(handler):
    handler.send_error(404)


def write(source, tmp_path):
    target = tmp_path / "out" / "corpus.txt"
    facts = write_corpus(str(source), target, downloads=tmp_path / "downloads", roots=[tmp_path])
    return facts, target.read_bytes()


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
    monkeypatch.setattr(corpus, "CHUNK_BYTES", chunk_bytes)
    (tmp_path / "dos.txt").write_bytes("\ufeffone\r\ntwo\rthree é\n\r\r\nend\r".encode())
    assert write("dos.txt", tmp_path)[1].decode() == "one\ntwo\nthree é\n\n\nend\n"


@pytest.mark.parametrize("chunk_bytes", [1, 3, 1 << 20])
def test_invalid_utf8_is_reported_with_its_offset(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(corpus, "CHUNK_BYTES", chunk_bytes)
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


def test_a_folder_is_its_texts_in_the_order_of_their_paths(tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text("first")
    (folder / "b" / "c.md").write_text("second\n")
    (folder / "z.TXT").write_text("third")
    (folder / "picture.png").write_bytes(b"\xff\xd8")
    (folder / ".hidden.txt").write_text("no")
    (folder / "loop").symlink_to(folder)
    assert write("texts", tmp_path)[1] == b"first\nsecond\nthird"


def test_a_folder_without_texts_is_refused(tmp_path):
    (tmp_path / "texts").mkdir()
    with pytest.raises(UserError, match=r"has no \.txt or \.md file"):
        write("texts", tmp_path)


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'nowhere\.txt' is not a known corpus"):
        write("nowhere.txt", tmp_path)


def test_a_relative_path_is_looked_up_in_each_root(tmp_path):
    first, second = tmp_path / "copy", tmp_path / "real"
    second.mkdir()
    (second / "mine.txt").write_text("x")
    assert corpus.find_path("mine.txt", [first, second]) == second / "mine.txt"
    assert corpus.find_path(str(second / "mine.txt"), [first]) == second / "mine.txt"


def test_a_url_is_downloaded(server, tmp_path):
    facts, content = write(server.url, tmp_path)
    assert content == TEXT
    assert facts.source == server.url


@pytest.mark.parametrize("reply", [cut_off, not_found])
def test_a_failed_download_leaves_nothing_behind(server, tmp_path, reply):
    server.reply = reply
    with pytest.raises(DownloadError, match="cannot download http://127") as raised:
        write(server.url, tmp_path)
    assert "\n" not in str(raised.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_unreachable_server_is_a_one_line_error(tmp_path):
    with pytest.raises(DownloadError, match=r"cannot download http://127\.0\.0\.1:9/"):
        write("http://127.0.0.1:9/x.txt", tmp_path)


def test_a_known_corpus_is_checked_and_downloaded_once(server, tmp_path):
    good = Download(server.url, hashlib.sha256(TEXT).hexdigest(), "ours")
    path = tmp_path / "known.txt"
    download_file(good, path)
    download_file(good, path)
    assert server.requests == 1
    path.write_bytes(b"damaged")
    download_file(good, path)
    assert (server.requests, path.read_bytes()) == (2, TEXT)
    with pytest.raises(FileError, match="has SHA-256"):
        download_file(Download(server.url, "0" * 64, "ours"), tmp_path / "other.txt")
    assert not (tmp_path / "other.txt").exists()


def test_prose_has_no_tables_and_no_indentation():
    text = "A  title\n=======\n\n    Some text.\n+---+\n| a |\n+---+\n\n\n\n>>> 1 + 1\nMore\ttext.\n"
    assert prose(text) == "A title\n\nSome text.\n\nMore text."


def test_python_docs_is_a_corpus_of_megabytes(tmp_path):
    facts, content = write("python-docs", tmp_path)
    assert facts.characters > 1_000_000
    assert facts.source.startswith("python-docs (CPython 3.")
    assert b"for loop" in content or b"for statement" in content
    assert write("python-docs", tmp_path)[0].sha256 == facts.sha256
