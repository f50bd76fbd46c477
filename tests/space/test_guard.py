import asyncio
import json

import pytest

from space.guard import MAX_BODY_BYTES, Guard


def sent_to(method, path, chunks=(b"",), headers=()):
    """The status of the response, and the request that the guarded application received."""
    given, answers, chunks = [], [], list(chunks)

    async def app(scope, receive, send):
        message = await receive() if scope["method"] == "POST" else {}
        given.append(message.get("body"))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

    async def send(message):
        answers.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    asyncio.run(Guard(app, {0: 2, "generate": 1})(scope, receive, send))
    return answers[0]["status"], given


@pytest.mark.parametrize(
    "path",
    ["/", "/config", "/gradio_api/info", "/gradio_api/queue/data", "/assets/index.js", "/gradio_api/heartbeat/a1b2",
     "/theme.css", "/gradio_api/call/generate/0a1b", "/static/img/logo.svg", "/gradio_api/startup-events"],
)  # fmt: skip
def test_endpoints_of_the_page_are_allowed(path):
    assert sent_to("GET", path)[0] == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("POST", "/upload"),
        ("GET", "/gradio_api/upload_progress"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/file=app.py"),
        ("GET", "/gradio_api/file/app.py"),
        ("GET", "/gradio_api/proxy=http://example.org"),
        ("POST", "/gradio_api/component_server"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/run-history/records"),
        ("POST", "/gradio_api/stream/1"),
        ("GET", "/custom_component/1/client/component/x.js"),
        ("POST", "/login"),
        ("PUT", "/"),
        ("DELETE", "/config"),
        ("GET", "/gradio_api/gradio_api/config"),
        ("GET", "/config/../file=x"),
        ("POST", "/gradio_api/call/" + "a" * 100),
    ],
)
def test_other_endpoints_do_not_exist(method, path):
    assert sent_to(method, path) == (404, [])


CALL = json.dumps({"data": [1]}).encode()


def test_a_call_arrives_as_it_was_sent():
    assert sent_to("POST", "/gradio_api/call/generate", [CALL[:5], CALL[5:]]) == (200, [CALL])
    join = b'{"data": [1, "x"], "fn_index": 0, "session_hash": "abc"}'
    assert sent_to("POST", "/gradio_api/queue/join", [join]) == (200, [join])
    assert sent_to("POST", "/gradio_api/cancel", [b"{}"]) == (200, [b"{}"])


def test_a_body_may_be_as_large_as_the_limit_and_not_larger():
    full = CALL + b" " * (MAX_BODY_BYTES - len(CALL))
    assert sent_to("POST", "/gradio_api/call/generate", [full])[0] == 200
    assert sent_to("POST", "/gradio_api/call/generate", [full, b" "]) == (413, [])
    assert sent_to("POST", "/gradio_api/call/generate", [b" " * 10_000] * 500) == (413, [])


@pytest.mark.parametrize("length", [b"64001", b"-1", b"1e3", b""])
def test_a_wrong_content_length_is_refused_before_reading(length):
    assert sent_to("POST", "/gradio_api/call/generate", [CALL], [(b"content-length", length)]) == (413, [])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        b"[]",
        b"{}",
        b'{"data": 1}',
        b"\xff",
        b"[" * 60_000,
        b'{"data": [1}',
        b'{"data": []}',
        b'{"data": [1, 2]}',
        b'{"data": [{"path": "/etc/passwd"}]}',
        b'{"data": [[1]]}',
        b'{"data": [1], "fn_index": 0}',
        b'{"data": [1], "fn_index": 7}',
        b'{"data": [1], "fn_index": true}',
        b'{"data": [1], "fn_index": "generate"}',
        b'{"data": [1], "session_hash": 5}',
        b'{"data": [1], "event_data": []}',
    ],
)
def test_invalid_calls_are_refused(body):
    assert sent_to("POST", "/gradio_api/call/generate", [body]) == (422, [])


def test_unknown_functions_are_refused():
    assert sent_to("POST", "/gradio_api/call/other", [CALL]) == (422, [])
    assert sent_to("POST", "/gradio_api/queue/join", [CALL]) == (422, [])


def test_web_sockets_are_not_expected():
    asyncio.run(Guard(None, {})({"type": "websocket"}, None, None))
