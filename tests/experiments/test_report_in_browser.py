"""The report in a real browser, without a network."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from experiments.report import write_report
from experiments.runs import Run
from tests.conftest import ROOT
from tests.experiments.report_runs import CHROMIUM, HOSTILE, MemoryFiles, invented, open_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
CHARTS = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "peak_memory_bytes")


def runs_of_all_kinds():
    return [
        *(invented(number) for number in range(3)),
        invented(3, HOSTILE),
        invented(4, "a-very-long-name-" * 20),
        invented(5, "\u202etxt.exe \u05e9\u05dc\u05d5\u05dd", tokens=1234),
        invented(6, "not-evaluated", without=["reports/evaluate"]),
        Run("failed", None, MemoryFiles({})),
    ]


def redrawn(page, change):
    before = page.get_attribute("body", "data-drawn")
    change()
    page.wait_for_selector(f"body:not([data-drawn='{before}'])", state="attached")


def see(page, name):
    page.locator(f"#chart-{name}").scroll_into_view_if_needed()
    page.wait_for_selector(f"#chart-{name} canvas")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("options", [{}, PHONE], ids=["desktop", "phone"])
def test_runs_of_all_kinds_need_no_network_and_no_sideways_scrolling(options, scheme, tmp_path):
    write_report(runs_of_all_kinds(), tmp_path / "page.html")

    def user(page):
        for name in CHARTS:
            see(page, name)
        width = options.get("viewport", {"width": 1280})["width"]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.title() == "Experiments: 8 runs"
        assert page.get_by_role("rowheader", name="document.title").count() > 0  # the name is shown, not run
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(20, 22, 26)") == (scheme == "dark")

    assert open_page(tmp_path / "page.html", user, color_scheme=scheme, **options) == []


@pytest.mark.parametrize("count", [1, 20])
def test_one_run_and_twenty(count, tmp_path):
    write_report([invented(number) for number in range(count)], tmp_path / "page.html")

    def user(page):
        for name in CHARTS:
            see(page, name)
        assert page.locator("tr[data-row]").count() == count
        assert ("The mean loss of run-00" in page.inner_text("#passage-summary")) == (count == 1)
        page.locator("#provenance summary").first.click()
        assert page.locator("#provenance code.command:visible").inner_text().startswith("python -m gpt2 reproduce run-")

    assert open_page(tmp_path / "page.html", user) == []


def test_curves_hide_smooth_zoom_and_change_their_axis(tmp_path):
    write_report([invented(number) for number in range(3)], tmp_path / "page.html")

    def picture(page):
        return page.evaluate("document.querySelector('#chart-loss canvas').toDataURL()")

    def user(page):
        see(page, "loss")
        seen = [picture(page)]

        def drag():
            page.locator("#chart-loss").scroll_into_view_if_needed()
            box = page.locator("#chart-loss canvas").bounding_box()
            page.mouse.move(box["x"] + 200, box["y"] + 100)
            page.mouse.down()
            page.mouse.move(box["x"] + 400, box["y"] + 120, steps=4)
            page.mouse.up()

        for change in (
            lambda: page.locator("input[data-run='1']").uncheck(),
            lambda: page.locator("#smoothing").fill("0.9"),
            lambda: page.locator("input[value='held_out']").check(force=True),
            lambda: page.locator("input[value='flops']").check(force=True),
            lambda: page.get_by_label("log scale").check(),
            lambda: page.locator("input[value='step']").check(force=True),
            drag,
        ):
            redrawn(page, change)
            seen.append(picture(page))
        assert len(set(seen)) == len(seen)
        assert 0 < float(page.input_value("#from")) < float(page.input_value("#to")) < 200
        redrawn(page, lambda: page.click("#reset"))
        assert page.input_value("#from") == ""
        redrawn(page, lambda: page.click("#no-runs"))
        assert page.inner_text("#chart-loss") == "No run is shown."
        assert page.locator("article:visible").count() == 0

    open_page(tmp_path / "page.html", user)


def test_the_passage_compares_two_models_also_by_the_keyboard(tmp_path):
    runs = [invented(number) for number in range(3)]
    write_report(runs, tmp_path / "page.html")

    def user(page):
        summary = page.inner_text("#passage-summary")
        colours = page.locator("#tokens span").evaluate_all("all => all.map(each => each.style.backgroundColor)")
        assert len(colours) == 256
        assert len(set(colours)) > 100
        page.select_option("#model-b", index=1)
        assert page.inner_text("#passage-summary") != summary
        page.focus("#tokens")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        chosen = page.inner_text("#token")
        assert "A " in chosen
        assert "difference" in chosen
        assert page.locator("#largest tbody tr").count() == 16
        page.select_option("#model-b", label="none: the loss of model A itself")
        assert page.locator("#largest tbody tr").count() == 0

    open_page(tmp_path / "page.html", user)


def test_the_leaderboard_sorts_by_a_column(tmp_path):
    write_report(
        [*(invented(number) for number in range(3)), Run("failed", None, MemoryFiles({}))], tmp_path / "page.html"
    )

    def user(page):
        names = page.locator(".leaderboard tr[data-row] th .name")
        page.get_by_role("button", name="Peak memory").click()
        assert names.all_inner_texts() == ["run-00", "run-01", "run-02", "failed"]
        page.get_by_role("button", name="Peak memory").click()
        assert names.all_inner_texts() == ["run-02", "run-01", "run-00", "failed"]
        assert page.locator("th[aria-sort='descending']").inner_text().startswith("Peak memory")

    open_page(tmp_path / "page.html", user)


def test_plots_of_dvc_draw_without_a_network_too(tmp_path):
    for name in (".dvc/config", "params.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "reports/train", tmp_path / "reports/train")
    plots = (ROOT / "dvc.yaml").read_text().partition("stages:")[0]
    stage = {"cmd": "true", "plots": ["reports/train/history.csv", "reports/train/loss.png"]}
    (tmp_path / "dvc.yaml").write_text(f"{plots}stages: {json.dumps({'train': stage})}")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path), "DVC_NO_ANALYTICS": "1"}
    for command in (["gpt2", "report", "--dvc-plots"], ["dvc", "plots", "show"]):
        done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr

    def user(page):
        page.wait_for_selector("canvas, svg.marks")
        assert page.locator("canvas, svg.marks").count() >= 2
        assert page.locator("img").evaluate("image => image.naturalWidth") > 100

    page = tmp_path / "dvc_plots/index.html"
    requests = open_page(page, user, ready="body")
    assert all(url.startswith(page.parent.as_uri()) for url in requests)
