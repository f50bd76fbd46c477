"""A web server for the tests of downloads."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

TEXT = b"All that is solid.\nAll that is not.\n"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        self.server.reply(self)

    def log_message(self, *_):
        pass


@contextmanager
def serving(server):
    """Serves in a thread for the block."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def web_server():
    """A web server; `reply` is what it does for the next requests."""
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.reply = 0, ok
    server.url = f"http://127.0.0.1:{server.server_port}/text.txt"
    return serving(server)


def send(content, length=None):
    """A reply with a content; length: which it claims to have."""

    def reply(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content) if length is None else length))
        handler.end_headers()
        handler.wfile.write(content)

    return reply


ok = send(TEXT)
cut_off = send(TEXT, 2 * len(TEXT))


def not_found(handler):
    """A reply of code 404."""
    handler.send_error(404)
