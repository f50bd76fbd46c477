"""The page, served as the Space serves it."""

import json

import httpx
import pytest

from tests.space import clients
from tests.space.clients import GOOD


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def test_the_api_is_documented_and_returns_completions(server):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(server.url, verbose=False)
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert list(endpoints) == ["/generate"]
    names = [parameter["parameter_name"] for parameter in endpoints["/generate"]["parameters"]]
    assert names[:2] == ["prompt", "max_new_tokens"]
    result = client.predict("Nobody", max_new_tokens=8, seed=5, samples=2, api_name="/generate")
    assert [len(each) for each in result["logprobs"]] == [8, 8]
    assert result["finish_reasons"] == ["length", "length"]
    assert (
        client.predict("Nobody", max_new_tokens=8, seed=5, samples=2, api_name="/generate")["texts"] == result["texts"]
    )
    with pytest.raises(AppError, match="max new tokens is"):
        client.predict("Nobody", max_new_tokens=8.5, api_name="/generate")


def test_a_completion_streams_through_the_api(client):
    parts = list(clients.stream_results(client, ["Nobody", 500, *GOOD[2:]]))
    assert len(parts) > 2
    assert parts[-1]["finish_reasons"] == ["length"]


def test_uploads_files_and_large_bodies_are_refused(client):
    assert client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404
    assert client.get("/gradio_api/file=/etc/passwd").status_code == 404
    assert client.get("/gradio_api/file=gpt_model.pt").status_code == 404
    for path in ("/gradio_api/queue/join", clients.CALL):
        assert client.post(path, content=b" " * 64_001).status_code == 413
        assert client.post(path, content=iter([b" " * 1000] * 100)).status_code == 413


def test_odd_calls_are_answered_or_refused(server):
    found = clients.fuzz(server.url, 200)
    assert found["answered"] > 0
    assert found["error"] > 0
    assert found["unfinished"] == 0
    assert [status for status in found if status.startswith("5") and status != "503"] == []


def test_a_flood_is_refused_except_for_the_calls_that_fit_into_the_queue(server, client):
    found = clients.flood(server.url, 100)
    assert set(found) <= {200, clients.QUEUE_FULL}
    assert client.get("/config").status_code == 200
    assert clients.result_after_queueing(client, GOOD, 60)["finish_reasons"] == ["length"]


def test_concurrent_clients_get_completions_without_errors(server):
    found = clients.load_test(server.url, 4, 3)
    assert found["errors"] == 0
    assert found["replies"] >= 4


def test_a_page_without_a_model_is_served_and_says_why(tmp_path):
    from tests.space.conftest import Server, write_space

    write_space(tmp_path)
    (tmp_path / "gpt_model.pt").write_bytes(b"other")
    server = Server(tmp_path)
    config = httpx.get(server.url + "/config").json()
    assert "gpt_model.pt is damaged" in json.dumps(config)
    assert "Traceback" not in server.stop()
