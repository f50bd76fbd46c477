"""Makes the pictures of README and docs: the architecture; the Space and MLflow's page of the last run; the report.

The pages are taken in a real browser, a Chromium on the PATH (or its path in CHROMIUM). Run it from the repository's
root: make screenshots
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from experiments.report import write_report
from experiments.report.command import all_runs
from tools import architecture

DOCS = Path("docs")
START_TIMEOUT_S = 90


def main() -> None:
    """Takes all pictures. That of the architecture needs no browser."""
    architecture.main()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium found; install one, or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-background-networking", "--disable-gpu"]
        )
        capture_space(browser)
        capture_mlflow(browser)
        capture_report(browser, Path(), DOCS)
        browser.close()


@contextmanager
def served(command: list[str], port: int, cwd: Path, **environment: str) -> Iterator[str]:
    """The URL of a running server, which is stopped at the end of the block."""
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, cwd=cwd, env={**os.environ, **environment}, start_new_session=True) as server:
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while True:
                try:
                    urllib.request.urlopen(url, timeout=2).close()
                    break
                except OSError:
                    if time.monotonic() > deadline or server.poll() is not None:
                        sys.exit(f"{' '.join(command)} does not respond")
                    time.sleep(0.3)
            yield url
        finally:
            os.killpg(server.pid, 15)


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def capture_space(browser: Browser) -> None:
    """docs/space.png: the page after a generation; docs/probabilities.png: its token probabilities."""
    port = free_port()
    environment = {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONDONTWRITEBYTECODE": "1"}
    with served([sys.executable, "app.py"], port, Path("dist/space"), **environment) as url:
        page = browser.new_page(viewport={"width": 1100, "height": 860})
        page.goto(f"{url}/?seed=4&max_new_tokens=120&samples=2&prompt=KING+RICHARD+II%3A")
        done = "document.querySelector('#status')?.innerText.startsWith('Done')"
        page.wait_for_function(done, timeout=60_000)
        page.screenshot(path=DOCS / "space.png")
        page.get_by_role("tab", name="Token probabilities").click()
        page.hover(".tokens span:nth-child(15)")
        page.wait_for_timeout(500)
        page.screenshot(path=DOCS / "probabilities.png", clip={"x": 60, "y": 380, "width": 620, "height": 460})


def capture_mlflow(browser: Browser) -> None:
    """docs/mlflow.png: the runs, side by side."""
    port = free_port()
    store = f"sqlite:///{Path('mlflow.db').absolute()}"
    command = ["mlflow", "ui", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(port)]
    with served(command, port, Path(), MLFLOW_DISABLE_TELEMETRY="true") as url:
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.goto(f"{url}/#/experiments/1/runs?compareRunsMode=CHART")
        page.wait_for_selector("text=Run Name", timeout=60_000)
        page.wait_for_timeout(3000)
        assistant = page.locator('[data-component-id="mlflow.assistant.chat_panel.close"]')
        if assistant.count():
            assistant.click()
        page.get_by_placeholder("Search metric charts").fill("(train|val)/loss")
        page.wait_for_selector("text=val/loss", timeout=60_000)
        page.wait_for_timeout(3000)
        page.screenshot(path=DOCS / "mlflow.png")


def capture_report(browser: Browser, repository: Path, folder: Path) -> None:
    """report.png: leaderboard and curves of the experiments; report-tokens.png: a passage in two models."""
    runs = all_runs(repository)
    if not runs:
        print("no picture of the report: there are no runs")
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_report(runs, Path(temporary) / "report.html")
        page = browser.new_page(viewport={"width": 1280, "height": 8000})
        page.goto((Path(temporary) / "report.html").as_uri())
        page.wait_for_selector("body[data-drawn]")
        page.wait_for_timeout(1000)
        for section, name, height in (("leaderboard", "report.png", 1260), ("passage", "report-tokens.png", 780)):
            top = page.locator(f"#{section}").evaluate("section => section.getBoundingClientRect().top")
            page.screenshot(path=folder / name, clip={"x": 0, "y": top, "width": 1280, "height": height})


if __name__ == "__main__":
    main()
