"""A token in the URL of the corpus must not leave params.yaml."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.conftest import our_text
from tests.project import Project

SECRET = "s3cretT0ken"


class Texts(BaseHTTPRequestHandler):
    """Serves our text to requests with the token."""

    def do_GET(self):
        found = self.path.endswith(f"?token={SECRET}")
        body = our_text(400).encode() if found else b""
        self.send_response(200 if found else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    with ThreadingHTTPServer(("127.0.0.1", 0), Texts) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.slow
def test_a_secret_of_the_corpus_stays_in_params(tmp_path, address):
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project")
    project.change(corpus={"source": f"{address}/text.txt?token=wrong{SECRET}"})
    refused = project.run("dvc", "repro", code=255)
    assert f"cannot download {address}/text.txt?***: Forbidden" in refused
    project.change(corpus={"source": f"{address}/text.txt?token={SECRET}"})
    output = refused + project.run("dvc", "repro")
    assert SECRET not in output
    folder = project.folder
    outputs = ("data", "models", "reports", "dist", "mlartifacts", "mlflow-outbox", "checkpoints", "mlflow.db")
    files = [file for name in outputs for file in (folder / name, *(folder / name).rglob("*")) if file.is_file()]
    assert len(files) > 30
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    assert f"{address}/text.txt?***" in (folder / "data/corpus.json").read_text()
