"""The page in a real browser, as users use it."""

import os
import shutil
import threading

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None or "CI" in os.environ, reason="needs a Chromium, and is not for CI")
STATUS = "document.querySelector('#status').innerText"
TEXT = "#text-1 textarea"


@pytest.fixture
def browse(server):
    """Runs a function with a browser. Fails if it or a script of the page raises."""

    def run(what, **options):
        failures = []

        def guarded():  # playwright needs a thread without an event loop
            from playwright.sync_api import sync_playwright

            try:
                with sync_playwright() as playwright:
                    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
                    opened = []

                    def page(address=""):
                        new = browser.new_page(**options)
                        new.on("pageerror", lambda error: failures.append(error))
                        new.goto(f"{server.url}/{address}")
                        new.wait_for_selector("#generate")
                        new.wait_for_function("document.querySelector('#prompt textarea').value !== ''")
                        opened.append(new)
                        return new

                    what(page)
                    browser.close()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        thread.join()
        assert failures == []

    return run


def set_number(page, label, value):
    page.get_by_label(f"number input for {label}").fill(str(value))
    page.keyboard.press("Tab")


def test_a_completion_streams_to_the_page(browse):
    def user(open_page):
        page = open_page()
        assert page.input_value("#prompt textarea") == "The miller"
        page.fill("#prompt textarea", "Old Tobias")
        set_number(page, "Max new tokens", 500)
        page.click("#generate")
        page.wait_for_function(f"{STATUS}.includes('tokens/s') && !{STATUS}.startsWith('Done')")
        early = page.input_value(TEXT)
        page.wait_for_function(f"{STATUS}.startsWith('Done: 500 tokens')")
        late = page.input_value(TEXT)
        assert early.startswith("Old Tobias")
        assert len(early) < len(late)
        page.get_by_role("tab", name="Token probabilities").click()
        token = page.locator(".tokens span").nth(4)
        token.hover()
        tip = token.evaluate("element => getComputedStyle(element, '::after').content")
        assert "Likeliest tokens:" in tip
        assert page.locator(".tokens span").count() == 500

    browse(user)


def generate_and_stop(page, stop):
    """Stops a completion after some tokens of each sample. On a busy machine the server may be done before the page."""
    for _ in range(5):
        page.click("#generate")
        page.wait_for_function(f"/^[0-9]{{2,}} tokens, /.test({STATUS})")
        stop()
        page.wait_for_function(f"/^(Stopped after|Done)/.test({STATUS})")
        if page.evaluate(STATUS).startswith("Stopped after"):
            return
    raise AssertionError("each completion was done before it was stopped")


def test_stopping_keeps_the_text_so_far(browse):
    def user(open_page):
        page = open_page()
        set_number(page, "Max new tokens", 500)
        set_number(page, "Samples", 4)
        for stop in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
            generate_and_stop(page, stop)
            texts = [page.input_value(f"#text-{i} textarea") for i in (1, 2, 3, 4)]
            assert all(text.startswith("The miller") for text in texts)
            assert len(set(texts)) == 4
            page.wait_for_timeout(300)
            assert page.input_value(TEXT) == texts[0]

    browse(user)


def test_a_link_generates_the_same_text_and_so_does_the_keyboard(browse):
    def user(open_page):
        page = open_page()
        page.fill("#prompt textarea", 'A "quoted" <b> & 100 %')
        set_number(page, "Max new tokens", 40)
        page.focus("#prompt textarea")
        page.keyboard.press("Control+Enter")
        page.wait_for_function(f"{STATUS}.startsWith('Done')")
        again = open_page(page.get_attribute("#repeat", "href"))
        again.wait_for_function(f"{STATUS}.startsWith('Done')")
        assert again.input_value(TEXT) == page.input_value(TEXT)
        assert again.input_value("#prompt textarea") == page.input_value("#prompt textarea")

    browse(user)


def test_an_example_fills_the_prompt(browse):
    def user(open_page):
        page = open_page()
        page.get_by_role("button", name="Nobody").click()
        page.wait_for_function("document.querySelector('#prompt textarea').value === 'Nobody'")

    browse(user)


def test_invalid_input_is_reported(browse):
    def user(open_page):
        page = open_page("?seed=1&max_new_tokens=99999")
        page.get_by_text("The link cannot be read").wait_for()
        page.wait_for_timeout(1000)
        assert page.get_by_text("The link cannot be read").is_visible()  # no generation starts
        assert page.input_value(TEXT) == ""
        page.locator("#prompt textarea").evaluate("element => element.removeAttribute('maxlength')")
        page.fill("#prompt textarea", "a" * 10_050)
        page.click("#generate")
        page.get_by_text("must be text of at most").wait_for()

    browse(user)


def test_two_users_at_once(browse):
    def users(open_page):
        pages = [open_page(), open_page()]
        for number, page in enumerate(pages):
            page.fill("#prompt textarea", f"Prompt {number}")
            set_number(page, "Max new tokens", 300)
            page.click("#generate")
        for number, page in enumerate(pages):
            page.wait_for_function(f"{STATUS}.startsWith('Done: 300 tokens')")
            assert page.input_value(TEXT).startswith(f"Prompt {number}")

    browse(users)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browse, scheme):
    def user(open_page):
        page = open_page()
        page.click("#generate")
        page.wait_for_function(f"{STATUS}.startsWith('Done')")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        dark = page.evaluate("document.body.classList.contains('dark')")
        assert dark == (scheme == "dark")

    browse(user, viewport={"width": 390, "height": 844}, color_scheme=scheme)
