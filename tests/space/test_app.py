import json
import math
import os
import shutil
import socket
import threading
import time
from itertools import pairwise

import pytest
import torch

from gpt2 import tokenizer
from gpt2.errors import FileError, UserError
from gpt2.exchange import write_space_model
from gpt2.files import sha256_of, write_json
from gpt2.generation import Sampling, generate
from space import app
from tests.conftest import TINY

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
}


@pytest.fixture
def folder(tiny_model, tmp_path):
    write_space_model(tiny_model, tmp_path)
    sums = {name: sha256_of(tmp_path / name) for name in (app.WEIGHTS, app.CONFIG)}
    write_json(tmp_path / app.MANIFEST, {"model": FACTS, "sha256": sums})
    return tmp_path


def test_the_model_comes_back(folder, tiny_model):
    idx = torch.arange(12)[None]
    assert torch.equal(app.load_model(folder)(idx)[0], tiny_model(idx)[0])


def test_text_streams_and_is_that_of_the_generator(folder):
    model = app.load_model(folder)
    pieces = list(app.stream(model, 16, "The miller", 20, 0.9, 40, 0.95, 3))
    texts = [text for text, _ in pieces]
    ids = tokenizer.encode("The miller")
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.95)
    expected = list(generate(model, ids, max_new_tokens=20, sampling=sampling, seed=3, context=16))
    assert texts[-1] == "The miller" + tokenizer.decode(expected)
    assert len(pieces) >= 20
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert pieces[-1][1].startswith("Done: 20 tokens, ")


def test_an_empty_prompt_and_broken_characters_are_fine(folder):
    model = app.load_model(folder)
    for prompt in ("", "\ud800 half a character", "🙂\x00"):
        assert list(app.stream(model, 16, prompt, 3, 1.0, 0, 1, 0))[-1][1].startswith("Done")


GOOD = {"prompt": "x", "max_new_tokens": 5, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 1}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt", None),
        ("prompt", ["a"]),
        ("prompt", "a" * 10_001),
        ("max_new_tokens", 0),
        ("max_new_tokens", 501),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", "7"),
        ("max_new_tokens", True),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("temperature", None),
        ("top_k", -1),
        ("top_k", 10**9),
        ("top_p", 0),
        ("top_p", 1.01),
        ("seed", -1),
        ("seed", 2**31),
        ("seed", {}),
    ],
)
def test_what_is_out_of_range_is_refused(folder, key, value):
    with pytest.raises(UserError, match=r"expected|must be text"):
        next(app.stream(app.load_model(folder), 16, **{**GOOD, key: value}))


def remove_weights(folder):
    (folder / app.WEIGHTS).unlink()


def truncate_weights(folder):
    data = (folder / app.WEIGHTS).read_bytes()
    (folder / app.WEIGHTS).write_bytes(data[:1000])


def empty_config(folder):
    (folder / app.CONFIG).write_bytes(b"")


def remove_manifest(folder):
    (folder / app.MANIFEST).unlink()


def break_manifest(folder):
    (folder / app.MANIFEST).write_text("[]")


DAMAGES = {
    remove_weights: "gpt_model.pt is missing",
    truncate_weights: "gpt_model.pt is damaged",
    empty_config: "gpt_config.pt is damaged",
    remove_manifest: "manifest.json is missing",
    break_manifest: "manifest.json cannot be read",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_missing_or_broken_file_is_said_on_the_page(folder, damage):
    damage(folder)
    page = json.dumps(app.build(folder).get_config_file(), default=str)
    assert "The model could not be loaded" in page
    assert DAMAGES[damage] in page
    assert "Generate" not in page


@pytest.mark.parametrize("content", [{**TINY.to_dict(), "n_layer": 3}, {"n_layer": 2}, [1], None])
def test_a_config_that_does_not_fit_is_refused(folder, content):
    torch.save(content, folder / app.CONFIG)
    with pytest.raises((FileError, UserError)):
        app.load_model(folder)


def test_the_page_says_what_the_model_is(folder):
    page = json.dumps(app.build(folder).get_config_file(), default=str)
    for fact in ("A tiny model", f"{TINY.num_parameters():,}", "12,345", "5.5 nats", "abc123", "0123456789ab"):
        assert fact in page


@pytest.fixture
def url(folder):
    """The page, served on a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = app.build(folder)
    page.queue(max_size=app.MAX_WAITING).launch(
        server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True
    )
    yield f"http://127.0.0.1:{port}"
    page.close()


def test_the_api_answers_and_refuses(url):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(url, verbose=False)
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/generate"]
    text, status = client.predict("Nobody", 8, 0.8, 0, 1, 5, api_name="/generate")
    assert text.startswith("Nobody")
    assert status.startswith("Done: 8 tokens")
    assert client.predict("Nobody", 8, 0.8, 0, 1, 5, api_name="/generate")[0] == text
    with pytest.raises(AppError, match="max new tokens is"):
        client.predict("Nobody", 8.5, 0.8, 0, 1, 5, api_name="/generate")


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None or "CI" in os.environ, reason="needs a Chromium, and is not for CI")
def test_a_person_generates_and_stops_in_a_browser(url, monkeypatch):
    from playwright.sync_api import sync_playwright

    errors = []

    def slowly(*arguments, **options):  # so that there is time to stop
        for token in generate(*arguments, **options):
            time.sleep(0.01)
            yield token

    monkeypatch.setattr(app, "generate", slowly)

    def visit():  # playwright's own event loop wants a thread without one
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page()
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(url)
            page.fill("#prompt textarea", "Old Tobias")
            page.click("#generate")
            page.wait_for_function("document.querySelector('#status').innerText.startsWith('Done')")
            assert page.input_value("#output textarea").startswith("Old Tobias")
            page.get_by_label("number input for Max new tokens").fill("500")
            page.keyboard.press("Tab")
            page.click("#generate")
            page.wait_for_function("document.querySelector('#status').innerText.includes(' of 500')")
            page.click("#stop")
            page.wait_for_function("document.querySelector('#status').innerText.trim() === 'Stopped.'")
            page.wait_for_timeout(500)  # what was on its way arrives
            stopped = page.input_value("#output textarea")
            assert len(tokenizer.encode(stopped)) < 490
            page.wait_for_timeout(700)
            assert page.input_value("#output textarea") == stopped
            browser.close()

    failures = []

    def guarded():
        try:
            visit()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    assert failures == []
    assert errors == []
