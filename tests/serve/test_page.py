"""The server's page in a real headless Chromium: type, stream, stop, slide, reload."""

from __future__ import annotations

import os
import re
import shutil
import time

import pytest
from serving import GREEDY, serving, wait_for

from colm_edge.llama.context import Context
from colm_edge.options import Options
from colm_edge.pair import load

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(color_scheme="light")
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("requestfailed", lambda r: problems.append(r.url) if "/v1/" not in r.url else None)
    yield page
    context.close()
    assert not problems


@pytest.fixture(scope="module")
def url(demo):
    with serving(demo, n_slots=2) as (url, _):
        yield url


def picture(page, name: str) -> None:
    """Keep a screenshot where COLM_EDGE_SCREENSHOTS says, to be looked at."""
    folder = os.environ.get("COLM_EDGE_SCREENSHOTS")
    if folder:
        page.screenshot(path=f"{folder}/{name}.png")


def ask(page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def test_a_question_is_answered_and_the_writers_are_marked(page, url):
    page.goto(url)
    assert page.get_by_text("wherever the switch defers to it").is_visible()
    ask(page, "What is the symbol of tungsten?")
    page.get_by_role("button", name="Send").wait_for()
    answer = page.locator("article").nth(1).locator(".text")
    text = answer.inner_text()
    assert "W" in text
    expert = answer.locator(".expert")
    assert expert.count() > 0
    assert expert.count() < answer.locator("span").count()
    # To be read without colour too.
    assert "underline" in expert.first.evaluate("e => getComputedStyle(e).textDecorationLine")
    assert re.fullmatch(r"expert, p_defer [01]\.\d{3}", expert.first.get_attribute("title"))
    assert re.fullmatch(r"\d+ % deferred, [\d.]+ tok/s", page.locator("#live").inner_text())
    page.reload()
    assert page.locator("article").nth(1).locator(".text").inner_text() == text
    assert page.locator("article .expert").count() == expert.count()
    ask(page, "What is the capital of France?")
    page.get_by_role("button", name="Send").wait_for()
    page.locator("article").nth(3).wait_for()
    picture(page, "light")
    page.emulate_media(color_scheme="dark")
    picture(page, "dark")
    page.set_viewport_size({"width": 390, "height": 780})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    picture(page, "phone")
    page.get_by_role("button", name="New chat").click()
    assert page.locator("article").count() == 0
    page.reload()
    assert page.locator("article").count() == 0


def test_the_threshold_slides_from_one_writer_to_the_other(page, url):
    page.goto(url)
    for value, all_expert in (("0", True), ("1", False)):
        page.get_by_label("threshold").fill(value)
        assert page.locator("#shown").inner_text() == f"{float(value):.2f}"
        ask(page, "What is the symbol of iron?")
        page.get_by_role("button", name="Send").wait_for()
        answer = page.locator("article").last.locator(".text")
        assert answer.locator("span").count() > 0
        experts = answer.locator(".expert").count()
        assert experts == (answer.locator("span").count() if all_expert else 0)
    page.reload()
    assert page.locator("#shown").inner_text() == "1.00"


def test_drafts_are_shown_until_they_are_final_or_undone(page, tiny):
    defaults = Options(temperature=0.0, defer_rate=0.2, review=1.0, review_window=6)
    with (
        load(
            tiny["template"], tiny["expert"], "margin", n_threads=1, n_ctx=256, defaults=defaults
        ) as pair,
        serving(pair, n_slots=1, max_tokens=40) as (url, _),
    ):  # fmt: skip
        page.add_init_script(
            """window.seen = {drafts: 0, taken: 0};
            new MutationObserver((changes) => changes.forEach((change) => {
                const count = (all) => [...all].filter((one) => one.className === "draft").length;
                seen.drafts += count(change.addedNodes);
                seen.taken += count(change.removedNodes);
            })).observe(document, {childList: true, subtree: true});"""
        )
        page.goto(url)
        ask(page, "one two three four five six seven")
        page.get_by_role("button", name="Send").wait_for()
        shown = page.locator("article").last.locator(".text")
        messages = [{"role": "user", "content": "one two three four five six seven"}]
        answer = pair.chat(messages, max_tokens=40)
        assert shown.inner_text().strip() == answer.text.strip()
        assert answer.stats.n_undone > 0
        assert shown.locator(".draft").count() == 0
        seen = page.evaluate("seen")
        assert seen["drafts"] == seen["taken"] > answer.stats.n_undone


def test_copying_takes_the_whole_answer(browser, url):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(url)
    ask(page, "What is the symbol of iron?")
    page.get_by_role("button", name="Send").wait_for()
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    text = page.locator("article").last.locator(".text").inner_text()
    assert page.evaluate("navigator.clipboard.readText()") == text
    context.close()


def test_an_answer_can_be_stopped(page, tiny, monkeypatch):
    with (
        load(
            tiny["endless"],
            tiny["endless"],
            "margin",
            n_threads=1,
            n_ctx=512,
            defaults=GREEDY.with_changes(threshold=0.9),
        ) as pair,
        serving(pair, n_slots=1) as (url, server),
    ):
        decode = Context.decode

        def slowly(*args, **more) -> None:
            time.sleep(0.02)  # as a real model: an answer takes ten seconds
            decode(*args, **more)

        monkeypatch.setattr(Context, "decode", slowly)
        page.goto(url)
        ask(page, "go on")
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Send").wait_for()
        wait_for(lambda: server.n_busy == 0)
        written = page.locator("article").last.locator(".text span").count()
        assert written < 480
        page.reload()
        assert page.locator("article").count() == 2


def test_what_goes_wrong_is_shown(page, url):
    page.goto(url)
    ask(page, "word " * 400)
    error = page.locator(".error")
    error.wait_for()
    assert "the context holds 192" in error.inner_text()
    picture(page, "error")
    # And it does not become part of the conversation.
    ask(page, "What is the symbol of iron?")
    page.locator("article").nth(3).locator(".text span").first.wait_for()
    assert page.locator(".error").count() == 1


def test_the_oldest_turns_are_forgotten(page, demo):
    """As in the terminal's chat: a conversation longer than the context goes on."""
    with serving(demo, n_slots=1) as (url, _):
        page.goto(url)
        for i in range(12):
            ask(page, "What is the symbol of tungsten?")
            answer = page.locator("article").nth(2 * i + 1).locator(".text")
            answer.locator("span").nth(5).wait_for()
            page.get_by_role("button", name="Send").wait_for()
            assert answer.inner_text().endswith("W.")  # not cut for want of room
        assert page.locator(".error").count() == 0
        assert page.locator("article").count() == 24
        # Of a question that leaves room for little else, more.
        ask(page, "What is the symbol of iron? " * 17)
        page.locator("article").nth(25).locator(".text span").first.wait_for()
        page.get_by_role("button", name="Send").wait_for()
        assert "the context holds" not in page.locator("#log").inner_text()


def test_a_key_is_asked_for(page, demo):
    with serving(demo, n_slots=1, api_key="sesame") as (url, _):
        page.on("dialog", lambda dialog: dialog.accept("sesame"))
        page.goto(url)
        ask(page, "What is the symbol of iron?")
        page.locator("article .text span.expert").first.wait_for()
        page.get_by_role("button", name="Send").wait_for()
        assert page.locator("article").count() == 2
