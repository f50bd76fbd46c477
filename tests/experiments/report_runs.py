"""Runs in memory, and the page about them in a browser."""

import json
import os
import shutil
import threading
from dataclasses import dataclass

import numpy as np

from benchmarks.report import files_of_a_run
from experiments.runs import Run
from tests.conftest import ROOT

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
PARAMS = (ROOT / "params.yaml").read_text()
HOSTILE = '</script><script>document.title="hacked"</script>'


@dataclass(frozen=True)
class MemoryFiles:
    content: dict

    def read(self, path):
        text = self.content.get(path)
        return None if text is None else text.encode()


def invented(number=0, name=None, *, without=(), steps=200, **changes):
    """A run; without: paths, or beginnings of paths, of files that it lacks. changes: to evaluate's metrics."""
    files = files_of_a_run(np.random.default_rng(number), number, steps, PARAMS)
    files = {path: text for path, text in files.items() if not path.startswith(tuple(without) or "-")}
    if changes:
        metrics = json.loads(files["reports/evaluate/metrics.json"])
        files["reports/evaluate/metrics.json"] = json.dumps(metrics | changes)
    return Run(name or f"run-{number:02}", f"{number:040x}", MemoryFiles(files))


def open_page(path, what, ready="body[data-drawn]", **options):
    """Calls a function with the page in a browser without a network. Returns all requests but that for the page."""
    requests, failures = [], []

    def guarded():  # playwright needs a thread without an event loop
        from playwright.sync_api import sync_playwright

        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
                page = browser.new_page(offline=True, **options)
                page.on("request", lambda request: requests.append(request.url))
                page.on("pageerror", lambda error: failures.append(error))
                page.on("console", lambda message: failures.append(message.text) if message.type == "error" else None)
                page.goto(path.as_uri())
                page.wait_for_selector(ready, state="attached")
                what(page)
                browser.close()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    assert not failures, failures
    return [url for url in requests if url != path.as_uri() and not url.startswith("data:")]
