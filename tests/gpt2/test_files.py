import json
import os
import subprocess
import sys
import time

import pytest

from gpt2.errors import BusyError, FileError
from gpt2.files import (
    JsonLines,
    atomic_save,
    atomic_write,
    delete_folder,
    file_lock,
    read_json_lines,
    sha256_of,
    verify_folder,
    write_folder,
    write_json,
    write_text,
)
from tests.conftest import ROOT


def test_a_write_is_atomic(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_write(path) as file:
        file.write(b"first")
        assert not path.exists()

    def fail():
        with atomic_write(path) as file:
            file.write(b"second")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == b"first"
    assert os.listdir(path.parent) == ["file"]


def test_atomic_save_keeps_the_old_file_if_saving_fails(tmp_path):
    path = tmp_path / "picture.png"
    write_text(path, "old")

    def fail(temporary):
        assert temporary.endswith(".png")
        with open(temporary, "w") as file:
            file.write("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_save(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["picture.png"]


def test_json_is_valid_and_readable(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"é": [1, None]}
    assert "é" in (tmp_path / "a.json").read_text()
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"é": [1, None]}


def test_sha256_of_a_known_text(tmp_path):
    write_text(tmp_path / "abc", "abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_lock_names_its_holder_and_is_released_with_it(tmp_path):
    program = (
        "import sys, pathlib; from gpt2.files import file_lock\n"
        f"with file_lock(pathlib.Path({str(tmp_path / 'lock')!r})):\n print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=f"process {holder.pid} on"), file_lock(tmp_path / "lock"):
            pass
        holder.kill()
        holder.wait()
    with file_lock(tmp_path / "lock"):
        pass


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / f".{gone.stdout.strip()}.tmp.file").write_text("half")
    (tmp_path / f".{os.getppid()}.tmp.file").write_text("of a running process")
    write_text(tmp_path / "file", "whole")
    assert sorted(os.listdir(tmp_path)) == [f".{os.getppid()}.tmp.file", "file"]


def test_a_folder_write_is_atomic_and_its_sums_are_verified(tmp_path):
    folder = tmp_path / "new/folder"
    write_folder(folder, {"a": lambda file: file.write(b"abc"), "b": lambda file: file.write(b"")}, {"step": 3})
    manifest = verify_folder(folder)
    assert manifest["step"] == 3
    assert manifest["sha256"]["a"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sorted(os.listdir(folder)) == ["a", "b", "manifest.json"]
    with pytest.raises(FileExistsError):
        write_folder(folder, {"a": lambda file: file.write(b"other")}, {})
    assert verify_folder(folder) == manifest
    (folder / "a").write_bytes(b"abd")
    with pytest.raises(FileError, match="a is damaged: its SHA-256 is not the manifest's"):
        verify_folder(folder)
    (folder / "a").unlink()
    with pytest.raises(FileError, match="cannot read"):
        verify_folder(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(FileError, match="incomplete"):
        verify_folder(folder)
    delete_folder(folder)
    delete_folder(folder)
    assert not folder.exists()


def test_a_reformatted_manifest_is_damaged(tmp_path):
    write_folder(tmp_path / "folder", {}, {"step": 3})
    path = tmp_path / "folder/manifest.json"
    path.write_text(path.read_text().replace("\n", ""))
    with pytest.raises(FileError, match="its text was changed"):
        verify_folder(tmp_path / "folder")


def test_lines_are_visible_at_once_and_a_partial_line_is_skipped(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = JsonLines(path, [{"step": 1}])
    lines.append({"step": 2, "text": "é\u2028\r\n"})
    found, offset = read_json_lines(path)
    assert found == [{"step": 1}, {"step": 2, "text": "é\u2028\r\n"}]
    with path.open("a") as file:
        file.write('{"step": 3')
    assert read_json_lines(path, offset) == ([], offset)
    lines.append({})
    lines.close()
    JsonLines(path, [{"step": 9}]).close()  # replaces the file
    assert read_json_lines(path)[0] == [{"step": 9}]


def test_a_lock_is_waited_for(tmp_path):
    with file_lock(tmp_path / "lock"):
        with (
            pytest.raises(BusyError, match=r"^my run is in use by process"),
            file_lock(tmp_path / "lock", what="my run"),
        ):
            pass
        started_s = time.monotonic()
        with pytest.raises(BusyError), file_lock(tmp_path / "lock", wait_s=0.3):
            pass
        assert time.monotonic() - started_s >= 0.3
    with file_lock(tmp_path / "lock", wait_s=5):
        pass
