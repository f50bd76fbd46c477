import hashlib

import pytest

from gpt2.data.sources import download
from gpt2.data.sources.download import Download, DownloadError, check_space, download_file
from gpt2.errors import FileError
from tests.gpt2.data.sources.server import TEXT, cut_off, not_found, send, web_server


@pytest.fixture
def server():
    with web_server() as server:
        yield server


@pytest.mark.parametrize("reply", [cut_off, not_found])
def test_a_failed_download_leaves_nothing_behind(server, tmp_path, reply):
    server.reply = reply
    with pytest.raises(DownloadError, match="cannot download http://127") as raised:
        download_file(Download(server.url, None, "ours"), tmp_path / "text.txt")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_server_is_a_one_line_error(tmp_path):
    with pytest.raises(DownloadError, match=r"cannot download http://127\.0\.0\.1:9/"):
        download_file(Download("http://127.0.0.1:9/x.txt", None, "ours"), tmp_path / "text.txt")


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


def test_a_download_that_the_disk_cannot_hold_is_refused_before_it(server, tmp_path):
    server.reply = send(TEXT, 1 << 60)
    with pytest.raises(FileError, match="needs about 1,152,921,504,606,846,976 bytes, but the disk of ") as raised:
        download_file(Download(server.url, None, "ours"), tmp_path / "new/text.txt")
    assert not isinstance(raised.value, DownloadError)
    assert list(tmp_path.iterdir()) == []


def test_the_free_space_of_a_folder_that_does_not_exist_yet(tmp_path, monkeypatch):
    check_space(tmp_path / "a/b", 1000, "mine")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": len(path.name)}))
    with pytest.raises(FileError, match="the text of mine needs about 1,000 bytes"):
        check_space(tmp_path / "a/b", 1000, "mine")
