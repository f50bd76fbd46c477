import bz2
import gzip
import io
import json
import os
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2.data.sources import text
from gpt2.data.sources.formats import SourceFile, documents_of, is_known, text_bytes
from gpt2.data.sources.local import local_file
from gpt2.errors import FileError, UserError

TEXTS = [f"The text {number}, é 漢字.\n" for number in range(50)]


def zstd(data):
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


def parquet(texts):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer)
    return buffer.getvalue()


def archive(members, **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, **options) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}
FORMATS = {
    ".txt": "".join(TEXTS).encode(),
    ".md": "".join(TEXTS).encode(),
    ".jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode(),
    ".csv": ("text\n" + "".join(f'"{text}"\n' for text in TEXTS)).encode(),
    ".parquet": parquet(TEXTS),
}


def read(path, column="text"):
    return ["".join(document) for document in documents_of(local_file(path), column)]


def refusal(folder, name, content, column="text"):
    before = sorted(folder.rglob("*"))
    path = folder / name
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read(path, column)
    message = str(raised.value)
    assert str(path) in message
    assert "\n" not in message
    assert sorted({*before, path}) == sorted(folder.rglob("*")), "a file was left behind"
    return message


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_each_format_and_compression(tmp_path, suffix, compression):
    path = tmp_path / f"Mine{suffix.upper()}{compression}"
    path.write_bytes(COMPRESS[compression](FORMATS[suffix]))
    assert read(path) == (["".join(TEXTS)] if suffix in (".txt", ".md") else TEXTS)
    assert is_known(path.name)


@pytest.mark.parametrize("name", ["mine", "mine.log", "mine.json", "mine.gz", "mine.v1.2.zst"])
def test_another_suffix_is_text(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](b"text\n"))
    assert read(path) == ["text\n"]
    assert not is_known(name)


def test_an_archive_is_its_files_in_the_order_of_their_paths(tmp_path):
    path = tmp_path / "mine.zip"
    members = {
        "b/2.jsonl.gz": gzip.compress(FORMATS[".jsonl"]),
        "b/1.parquet": FORMATS[".parquet"],
        "a.txt": "first",
        "picture.png": b"\xff",
        ".hidden.txt": "no",
        "__MACOSX/a.txt": "no",
        "folder/": "",
    }
    path.write_bytes(archive(members))
    assert read(path) == ["first", *TEXTS, *TEXTS]


def test_concatenated_compressed_files_are_one(tmp_path):
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"mine.txt{suffix}"
        path.write_bytes(compress(b"one ") + compress(b"two"))
        assert read(path) == ["one two"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_damaged_compressed_files_are_refused(tmp_path, suffix):
    whole = COMPRESS[suffix](os.urandom(1000).hex().encode())
    place = len(whole) // 2
    changed = whole[:place] + b"\0" * 60 + whole[place + 60 :]
    for damaged in (whole[:-9], whole[:place], b"no such format", *([] if suffix == ".zst" else [changed])):
        message = refusal(tmp_path, f"mine.txt{suffix}", damaged)
        assert "damaged, incomplete or of another format" in message


def test_wrong_encodings_are_refused_in_every_format(tmp_path):
    for suffix, compress in COMPRESS.items():
        for kind in (".txt", ".jsonl", ".csv"):
            assert "is not UTF-8" in refusal(tmp_path, f"mine{kind}{suffix}", compress(b'{"text": "caf\xe9"}'))
    assert "'a.txt' is not UTF-8" in refusal(tmp_path, "mine.zip", archive({"a.txt": b"caf\xe9"}))


def test_missing_columns_are_named_in_every_format(tmp_path):
    for suffix in (".jsonl", ".csv", ".parquet"):
        assert "has no column 'body', but 'text'" in refusal(tmp_path, f"mine{suffix}", FORMATS[suffix], "body")
    assert "has no column 'body'" in refusal(tmp_path, "mine.zip", archive({"a.csv": FORMATS[".csv"]}), "body")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_a_bomb_is_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(text, "EXPANSION_FREE_BYTES", 1 << 20)
    bomb = COMPRESS[suffix](b"0" * (8 << 20))
    assert "expands to more than 200 times its" in refusal(tmp_path, f"mine.txt{suffix}", bomb)
    assert "like a zip bomb" in refusal(tmp_path, f"mine.parquet{suffix}", bomb)


def test_a_zip_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "EXPANSION_FREE_BYTES", 1 << 20)
    for name in ("bomb.txt", "bomb.jsonl", "bomb.parquet"):
        message = refusal(tmp_path, "mine.zip", archive({name: b"0" * (8 << 20)}))
        assert f"'{name}' expands to more than 200 times" in message


def test_text_that_compresses_well_is_no_bomb(tmp_path):
    path = tmp_path / "mine.txt.gz"
    path.write_bytes(gzip.compress(b"0" * (2 << 20)))
    assert len(read(path)[0]) == 2 << 20


def test_paths_in_an_archive_are_only_names(tmp_path):
    folder = tmp_path / "a/b"
    folder.mkdir(parents=True)
    path = folder / "mine.zip"
    path.write_bytes(archive({"../../out.txt": "one", "/tmp/gpt2-out.txt": "two", "folder\\..\\out.txt": "three"}))
    assert sorted(read(path)) == ["one", "three", "two"]
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]
    assert not Path("/tmp/gpt2-out.txt").exists()


def test_archives_that_cannot_be_read_are_refused(tmp_path):
    whole = archive({"a.txt": os.urandom(500).hex()})
    assert "damaged" in refusal(tmp_path, "mine.zip", whole[:-30])
    assert "damaged" in refusal(tmp_path, "mine.zip", b"")
    assert "damaged" in refusal(tmp_path, "mine.zip", whole[:60] + b"\0" * 60 + whole[120:])
    assert "has no file of a known format" in refusal(tmp_path, "mine.zip", archive({"a.png": "x"}))
    assert "'a.zip' is an archive" in refusal(tmp_path, "mine.zip", archive({"a.zip": whole}))
    for name in ("mine.tar.gz", "mine.tgz", "mine.7z", "mine.zip.gz"):
        assert "unpack it" in refusal(tmp_path, name, gzip.compress(b"x"))


def test_an_encrypted_archive_is_refused(tmp_path):
    whole = bytearray(archive({"a.txt": "secret"}))
    whole[6] |= 1  # the flag in the local header
    whole[whole.index(b"PK\1\2") + 8] |= 1  # and in the directory
    assert "'a.txt' is encrypted" in refusal(tmp_path, "mine.zip", bytes(whole))


def test_an_archive_of_an_unknown_compression_is_refused(tmp_path):
    whole = bytearray(archive({"a.txt": "text"}))
    whole[8] = whole[whole.index(b"PK\1\2") + 10] = 99
    assert "damaged, incomplete or of another format" in refusal(tmp_path, "mine.zip", bytes(whole))


def test_a_file_that_cannot_be_opened_is_a_file_error(tmp_path):
    def refuse():
        raise PermissionError(13, "Permission denied")

    with pytest.raises(FileError, match=r"cannot read mine\.txt: Permission denied"):
        list(documents_of(SourceFile("mine.txt", "mine.txt", 1, refuse), "text"))


def test_the_size_of_the_text_is_estimated():
    def estimate(name, size):
        return text_bytes(SourceFile(name, name, size, io.BytesIO))

    assert estimate("a.txt", 1000) == 1000
    assert estimate("a.jsonl.zst", 1000) == 1750
    assert estimate("a.parquet", None) == 0
