"""An ASGI middleware in front of Gradio that allows only the endpoints that the page needs.

Gradio accepts uploads, serves files and reads bodies of any size, whatever the page contains.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

MAX_BODY_BYTES = 64_000
GET = re.compile(
    r"/|/(config|info|openapi\.json|theme\.css|favicon\.ico|robots\.txt|manifest\.json|app_id|login_check|user|token"
    r"|startup-events|queue/status|queue/data)/?|/(static|assets|svelte)/.+|/heartbeat/[\w-]{1,64}"
    r"|/call/\w{1,64}/[\w-]{1,64}"
)
POST = re.compile(r"/(?:queue/join|cancel|reset)|/(?:call|run)/(\w{1,64})")
PREFIX = "/gradio_api"
SCALARS = (str, int, float, bool, type(None))
FIELDS = {
    "fn_index": (int, type(None)),
    "trigger_id": (int, type(None)),
    "session_hash": (str, type(None)),
    "event_id": (str, type(None)),
    "event_data": (dict, type(None)),
}
"""Fields that Gradio's clients send besides the values, and their types."""

Scope = dict[str, Any]


class Guard:
    """An ASGI application that rejects requests with 404, 413 or 422, and forwards the rest."""

    def __init__(self, app: Any, num_inputs: Mapping[int | str | None, int]) -> None:
        """num_inputs: number of inputs of each callable function, by index and by API name."""
        self.app, self.num_inputs = app, num_inputs

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serves one request."""
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        # the page uses no web sockets; they are closed

    async def _serve(self, scope: Scope, receive: Any, send: Any) -> None:
        path: str = scope["path"]
        path = path[len(PREFIX) :] if path.startswith(PREFIX + "/") else path
        allowed = POST if scope["method"] == "POST" else GET if scope["method"] in ("GET", "HEAD") else None
        if allowed is None or not allowed.fullmatch(path):
            await refuse(send, 404, "not found")
        elif scope["method"] == "POST":
            await self._serve_post(path, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _serve_post(self, path: str, scope: Scope, receive: Any, send: Any) -> None:
        body = await self._body(scope, receive)
        if body is None:
            await refuse(send, 413, f"more than {MAX_BODY_BYTES:,} bytes")
            return
        if reason := self.find_problem(path, body):
            await refuse(send, 422, reason)
            return

        async def replay() -> Any:
            nonlocal body
            if body is not None:
                message, body = {"type": "http.request", "body": body, "more_body": False}, None
                return message
            return await receive()

        await self.app(scope, replay, send)

    @staticmethod
    async def _body(scope: Scope, receive: Any) -> bytes | None:
        """The whole body; None if it is too large. A Content-Length over the limit is rejected before reading."""
        for name, value in scope["headers"]:
            if name == b"content-length" and not (value.isdigit() and int(value) <= MAX_BODY_BYTES):
                return None
        body = b""
        while len(body) <= MAX_BODY_BYTES:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                return body if len(body) <= MAX_BODY_BYTES else None
        return None

    def find_problem(self, path: str, body: bytes) -> str:
        """Why to reject a call; empty if Gradio's own clients could send it."""
        try:
            sent = json.loads(body)
        except (ValueError, RecursionError):
            return "expected JSON"
        if not isinstance(sent, dict):
            return "expected a JSON object"
        for key, types in FIELDS.items():
            if type(sent.get(key)) not in types:
                return f"{key} has the wrong type"
        if path in ("/cancel", "/reset"):
            return ""
        match = POST.fullmatch(path)
        named = match[1] if match else None
        function = sent["fn_index"] if sent.get("fn_index") is not None else named
        num_inputs = self.num_inputs.get(function)
        if num_inputs is None:
            return "unknown function"
        data = sent.get("data")
        if not isinstance(data, list) or len(data) != num_inputs:
            return f"expected a list of {num_inputs} values as data"
        if not all(isinstance(value, SCALARS) for value in data):
            return "expected strings and numbers as data"
        return ""


async def refuse(send: Any, status: int, reason: str) -> None:
    """Sends a status and one line."""
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": reason}).encode()})
