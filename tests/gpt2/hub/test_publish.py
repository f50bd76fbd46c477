"""Publishing to a local stub of the Hub."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.conftest import ROOT

TOKEN = "hf_" + "a" * 34


class Hub(ThreadingHTTPServer):
    """Repositories in memory. refuses: a prefix of paths, and the status for them."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.asked, self.commits, self.refuses = {}, [], [], {}
        self.stages = ["BUILDING", "RUNNING_APP_STARTING", "RUNNING"]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def respond(self):
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        hub.asked.append((self.command, path))
        for start, status in hub.refuses.items():
            if path.startswith(start):
                return self.answer({"error": "no"}, status)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "who are you"}, 401)
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            kind = wanted.get("type") or "model"
            name = f"{kind}s/me/{wanted['name']}"
            hub.created = wanted
            status = 409 if name in hub.repos else 200
            hub.repos.setdefault(name, {".gitattributes": b"", "stale.txt": b"old"})
            prefix = "" if kind == "model" else f"{kind}s/"
            return self.answer({"url": f"{hub.url}/{prefix}me/{wanted['name']}", "error": "there already"}, status)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        match = re.fullmatch(r"/api/((?:spaces|models)/me/\w+)(/.*)?", path)
        if not match or match[1] not in hub.repos:
            return self.answer({"error": "not found"}, 404)
        files, rest = hub.repos[match[1]], match[2] or ""
        if rest.startswith("/preupload"):
            return self.answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in json.loads(body)["files"]
                    ]
                }
            )
        if rest.startswith("/commit"):
            for line in body.decode().splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "deletedFile":
                    del files[value["path"]]
            hub.commits.append(match[1])
            return self.answer({"commitUrl": f"{hub.url}/me/x/commit/abc", "commitOid": "abc", "success": True})
        if rest == "/runtime":
            stage = hub.stages.pop(0) if len(hub.stages) > 1 else hub.stages[0]
            return self.answer({"stage": stage, "sha": "abc", "hardware": {"current": None, "requested": None}})
        if rest.startswith("/tree"):
            return self.answer([{"type": "file", "path": name, "size": 1, "oid": "0"} for name in files])
        return self.answer({"id": "me/x", "sha": "old", "siblings": [{"rfilename": name} for name in files]})

    do_GET = do_POST = do_HEAD = respond  # noqa: N815 - as the base class looks for them


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()


@pytest.fixture
def dist(tmp_path):
    (tmp_path / "dist/space/gpt2").mkdir(parents=True)
    (tmp_path / "dist/hf").mkdir()
    (tmp_path / "dist/space/README.md").write_text("---\nsuggested_hardware: cpu-basic\n---\n")
    (tmp_path / "dist/space/gpt2/model.py").write_text("# the model\n")
    (tmp_path / "dist/space/gpt_model.pt").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "dist/hf/config.json").write_text("{}")
    return tmp_path


def publish(folder, hub, *arguments, token=TOKEN):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": token,
    }
    if not token:
        del environment["HF_TOKEN"]
    command = [sys.executable, "-m", "gpt2", "publish", "--repo", "me/x", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_a_dry_run_lists_files_and_needs_no_token(dist):
    done = publish(dist, "http://127.0.0.1:9", "--dry-run", token="")
    assert done.returncode == 0
    assert "space me/x, from dist/space: 3 files, 2,6" in done.stdout
    assert re.search(r"2,560  gpt_model\.pt", done.stdout)
    assert "model me/x, from dist/hf: 1 files, 2 bytes" in done.stdout


def test_publish_creates_a_space_and_waits_until_it_runs(dist, hub):
    done = publish(dist, hub, "--space")
    assert done.returncode == 0, done.stderr
    files = hub.repos["spaces/me/x"]
    assert set(files) == {".gitattributes", "README.md", "gpt2/model.py", "gpt_model.pt"}  # what was stale is gone
    assert files["gpt_model.pt"] == (dist / "dist/space/gpt_model.pt").read_bytes()
    assert hub.commits == ["spaces/me/x"]
    assert hub.created["sdk"] == "gradio"
    assert "hardware" not in hub.created
    assert f"space: {hub.url}/spaces/me/x" in done.stdout
    assert "the Space is building" in done.stderr
    assert "the Space is running\n" in done.stderr


def test_a_second_upload_changes_only_changed_files(dist, hub):
    assert publish(dist, hub, "--space").returncode == 0
    (dist / "dist/space/gpt2/model.py").unlink()
    done = publish(dist, hub, "--space")
    assert done.returncode == 0, done.stderr
    assert "gpt2/model.py" not in hub.repos["spaces/me/x"]


def test_without_a_flag_both_are_published(dist, hub):
    done = publish(dist, hub)
    assert done.returncode == 0, done.stderr
    assert hub.commits == ["models/me/x", "spaces/me/x"]


def test_a_space_for_zero_gpu_requests_the_hardware(dist, hub):
    (dist / "dist/space/README.md").write_text("---\nsuggested_hardware: zero-a10g\n---\n")
    assert publish(dist, hub, "--space").returncode == 0
    assert hub.created["hardware"] == "zero-a10g"


@pytest.mark.parametrize(
    ("start", "status", "expected"),
    [
        ("/api/whoami", 401, "does not accept the token"),
        ("/api/repos/create", 402, "paid plan"),
        ("/api/repos/create", 403, "no write access"),
        ("/api/spaces/me/x/commit", 403, "no write access"),
        ("/api/spaces/me/x/commit", 400, "the Hub refused"),
        ("/api/spaces/me/x/runtime", 404, "the repository does not exist"),
    ],
)
def test_errors_of_the_hub_are_one_line_with_a_remedy(dist, hub, start, status, expected):
    hub.refuses[start] = status
    done = publish(dist, hub, "--space")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert expected in last
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr + done.stdout


def test_a_missing_token_is_an_error(dist, hub):
    done = publish(dist, hub, "--space", token="")
    assert (done.returncode, "no token: log in" in done.stderr) == (1, True)


def test_a_missing_network_is_an_error(dist):
    done = publish(dist, "http://127.0.0.1:9", "--space")
    assert done.returncode == 1
    assert "http://127.0.0.1:9 cannot be reached" in done.stderr.splitlines()[-1]


def test_a_space_that_does_not_build_is_an_error(dist, hub):
    hub.stages = ["BUILDING", "BUILD_ERROR"]
    done = publish(dist, hub, "--space")
    assert done.returncode == 1
    assert f"does not run (BUILD_ERROR); its log is at {hub.url}/spaces/me/x" in done.stderr


def test_an_empty_folder_is_an_error(tmp_path, hub):
    done = publish(tmp_path, hub)
    assert (done.returncode, "dist/hf has no files" in done.stderr) == (74, True)
    assert hub.asked == []


@pytest.mark.parametrize("name", ["x", "me/", "me/x/y", "../x y/z"])
def test_an_invalid_repository_name_is_refused(dist, hub, name):
    done = publish(dist, hub, "--repo", name)
    assert (done.returncode, "expected user/name" in done.stderr) == (2, True)
