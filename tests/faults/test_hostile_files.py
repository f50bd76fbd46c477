"""Malicious files, which run code or exhaust memory if they are unpickled."""

import io
import json
import os
import pickle
import struct
import sys
import tarfile
import time
import zipfile

import pytest
import torch

from gpt2.errors import GPT2Error
from gpt2.files import write_folder
from gpt2.model.storage import load_folder
from gpt2.training.checkpoints import CHECKPOINT_FILE, CheckpointStore
from space.model_files import load_model as load_space_model
from tests.conftest import TINY


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def as_torch(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def raw(payload):
    return b"\x80\x02c" + payload


def nested_zip(canary):
    inner = as_torch(Call(os.system, f"touch {canary}"))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", inner)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def old_tar(canary):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("pickle", "sys_info", "storages", "tensors"):
            data = pickle.dumps(Call(os.system, f"touch {canary}"))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


PAYLOADS = {
    "os.system": lambda canary: as_torch(Call(os.system, f"touch {canary}")),
    "as a weight": lambda canary: as_torch({"transformer.wte.weight": Call(os.system, f"touch {canary}")}),
    "exec": lambda canary: as_torch(Call(exec, f"open({str(canary)!r}, 'w')")),
    "eval": lambda canary: as_torch(Call(eval, f"open({str(canary)!r}, 'w')")),
    "getattr": lambda canary: as_torch(Call(getattr, Call(__import__, "os"), "system")),
    "runpy": lambda canary: as_torch(Call(__import__("runpy").run_path, str(canary))),
    "subprocess": lambda canary: as_torch(Call(__import__("subprocess").check_call, ["touch", str(canary)])),
    "pip": lambda canary: raw(b"pip\nmain\n(lX\x07\x00\x00\x00installatR."),
    "bare pickle": lambda canary: pickle.dumps(Call(os.system, f"touch {canary}"), protocol=2),
    "bare pickle, protocol 0": lambda canary: f"cos\nsystem\n(S'touch {canary}'\ntR.".encode(),
    "nested zip": nested_zip,
    "old tar": old_tar,
    "7z": lambda canary: b"7z\xbc\xaf\x27\x1c" + bytes(100),
    "a huge string": lambda canary: b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.",
    "no end": lambda canary: b"\x80\x02" + b"(" * 100_000,
    "a list": lambda canary: as_torch([1, 2, 3]),
    "text": lambda canary: b"import os\n",
    "nothing": lambda canary: b"",
}


@pytest.fixture(params=PAYLOADS)
def hostile(request, tmp_path):
    """The bytes of a .pt file. Checks that it ran no code and that loading was quick."""
    canary = tmp_path / "canary"
    started_s = time.monotonic()
    yield PAYLOADS[request.param](canary)
    assert not canary.exists()
    assert time.monotonic() - started_s < 20
    assert "pip" not in sys.modules or "pip._internal" not in sys.modules


def test_the_payloads_are_live(tmp_path):
    """Unpickling a payload creates the canary."""
    canary = tmp_path / "canary"
    torch.load(io.BytesIO(PAYLOADS["os.system"](canary)), weights_only=False)
    assert canary.exists()


def test_a_malicious_checkpoint_runs_nothing(hostile, tmp_path):
    folder = tmp_path / "run/step-000001"
    folder.parent.mkdir()
    write_folder(folder, {CHECKPOINT_FILE: lambda file: file.write(hostile)}, {"step": 1})
    with pytest.raises(GPT2Error, match=r"^[^\n]+$"):
        CheckpointStore(folder.parent).load(1)


def test_a_malicious_model_runs_nothing(hostile, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(hostile)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    with pytest.raises(GPT2Error):
        load_folder(tmp_path)


@pytest.mark.parametrize("name", ["gpt_model.pt", "gpt_config.pt"])
def test_a_malicious_space_runs_nothing(hostile, tmp_path, name):
    torch.save(TINY.to_dict(), tmp_path / "gpt_config.pt")
    torch.save({}, tmp_path / "gpt_model.pt")
    (tmp_path / name).write_bytes(hostile)
    with pytest.raises(GPT2Error):
        load_space_model(tmp_path)
