import json
import os
import subprocess
import sys

import pytest

from gpt2.errors import BusyError
from gpt2.files import atomic_write, hold, sha256_of, write_json, write_text, write_with
from tests.conftest import ROOT


def test_a_file_appears_whole_or_not_at_all(tmp_path):
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


def test_write_with_keeps_the_old_file_if_saving_fails(tmp_path):
    path = tmp_path / "picture.png"
    write_text(path, "old")

    def fail(temporary):
        assert temporary.endswith(".png")
        with open(temporary, "w") as file:
            file.write("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_with(path, fail)
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


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path):
    program = (
        "import sys, pathlib; from gpt2.files import hold\n"
        f"with hold(pathlib.Path({str(tmp_path / 'lock')!r})):\n print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=f"process {holder.pid} on"), hold(tmp_path / "lock"):
            pass
        holder.kill()
        holder.wait()
    with hold(tmp_path / "lock"):
        pass
