"""A server of the routes of the Hugging Face Hub that reading a data set takes."""

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from tests.gpt2.data.sources.server import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "me/texts"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urlsplit(self.path)
        hub = self.server
        hub.requests.append(self.path)
        path = unquote(url.path)
        if hub.refusal:
            self.refuse(*hub.refusal)
        elif match := re.fullmatch(rf"/api/datasets/{NAME}(?:/revision/(.+))?", path):
            revision = match[1] or "main"
            if revision in (*hub.revisions, COMMIT):
                self.send_json({"id": NAME, "sha": COMMIT, "cardData": {"license": "cc0-1.0"}})
            else:
                self.refuse(404, "RevisionNotFound")
        elif match := re.fullmatch(rf"/api/datasets/{NAME}/tree/{COMMIT}(?:/(.+))?", path):
            self.send_tree(f"{match[1]}/" if match[1] else "", "recursive=true" in url.query.lower())
        elif match := re.fullmatch(rf"/datasets/{NAME}/resolve/{COMMIT}/(.+)", path):
            self.send_file(hub.files[match[1]])
        else:
            self.refuse(404, "RepoNotFound")

    def send_tree(self, prefix, is_recursive):
        entries = {}
        for path, content in self.server.files.items():
            if path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                for depth in range(1, len(parts)):
                    if is_recursive or depth == 1:
                        folder = prefix + "/".join(parts[:depth])
                        entries[folder] = {"type": "directory", "path": folder, "oid": "1" * 40, "size": 0}
                if is_recursive or len(parts) == 1:
                    entries[path] = {"type": "file", "path": path, "oid": "2" * 40, "size": len(content)}
        if entries:
            self.send_json(list(entries.values()))
        else:
            self.refuse(404, "EntryNotFound")

    def send_file(self, content):
        status = 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            content, status = content[int(wanted[1]) : int(wanted[2] or len(content)) + 1], 206
        if self.server.is_cut:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) + 1))
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = True
        else:
            self.send(status, content)

    def send_json(self, content):
        self.send(200, json.dumps(content).encode())

    def send(self, status, content):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def hub_of(files):
    """A Hub with the data set me/texts of these files, by path. `refusal`: status and code of all answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.refusal, server.is_cut = files, [], None, False
    server.revisions = {"main", "v1", "refs/convert/parquet"}
    server.url = f"http://127.0.0.1:{server.server_port}"
    return serving(server)
