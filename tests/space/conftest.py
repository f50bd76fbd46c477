"""A Space of a tiny model, and the page that serves it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from gpt2.config import DTYPES
from gpt2.files import sha256_of
from gpt2.hub.export import save_space_model
from gpt2.model.transformer import GPT
from space import model_files
from tests.conftest import ROOT, TINY

FACTS = {
    "title": "A tiny model",
    "examples": ["The miller", "Nobody"],
    "parameters": TINY.num_parameters(),
    **TINY.to_dict(),
    "context": 16,
    "corpus": "our text",
    "corpus_characters": 12345,
    "fallback_reason": None,
    "steps": 10,
    "tokens": 1000,
    "validation_loss": 5.5,
    "perplexity": 244.7,
    "bits_per_byte": 2.1,
    "mlflow_run_id": "abc123",
    "git_commit": "0123456789abcdef",
    "dtype_losses": dict.fromkeys(DTYPES, 5.5),
    "target": "cpu",
}


def write_manifest(folder, facts):
    """manifest.json as the export writes it, for the files that are there now."""
    names = [name for name in (model_files.WEIGHTS, model_files.CONFIG) if (folder / name).is_file()]
    manifest = {"model": facts, "sha256": {name: sha256_of(folder / name) for name in names}}
    (folder / model_files.MANIFEST).write_text(json.dumps(manifest))


def write_space(folder: Path) -> Path:
    """A Space's model files."""
    torch.manual_seed(0)
    save_space_model(GPT(TINY), folder)
    write_manifest(folder, FACTS)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_space(tmp_path)


class Server:
    """A page in a process of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        program = (  # as space/app.py, with another folder
            "import pathlib; from gpt2.kernels import library; library.start_build(); "
            f"from space.server import main; main(pathlib.Path({str(folder)!r}))"
        )
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "GRADIO_ANALYTICS_ENABLED": "False",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program], cwd=folder, env=environment, stdout=log, stderr=log
            )
        deadline_s = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(self.url, timeout=5).close()
                return
            except OSError:
                assert time.monotonic() < deadline_s
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.1)

    def resident_bytes(self) -> int:
        """Resident memory of the process."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

    def stop(self) -> str:
        """Stops the process. Returns its output."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=30)
        return self.log.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server for all tests of a module, which must print no traceback."""
    server = Server(write_space(tmp_path_factory.mktemp("space")))
    yield server
    output = server.stop()
    assert "Traceback" not in output, output[-3000:]
